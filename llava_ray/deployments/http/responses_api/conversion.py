"""Conversion of a Responses request to a chat request, and of a chat's refusals back to its fields."""

import re
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from pydantic import ValidationError

from llava_ray.deployments.http.complaints import describe_invalid_request
from llava_ray.deployments.http.responses_api.fields import NamedFunction, ResponsesRequest
from llava_ray.deployments.http.responses_api.items import (
    FunctionCallItem,
    FunctionResultItem,
    InputImage,
    InputItem,
    MessageItem,
    RefusalPart,
)
from llava_ray.deployments.http.schema import ChatRequest
from llava_ray.deployments.refusal import RefusalError, Refused
from llava_ray.deployments.replica import AnswerPiece

# A chat's fields and what they are here, the longer ones first.
_NAMES = (
    (re.compile(r"^messages\b.*"), "input"),
    (re.compile(r"^response_format(\.json_schema)?\b"), "text.format"),
    (re.compile(r"^max_(completion_)?tokens\b"), "max_output_tokens"),
    (re.compile(r"^tools\.(\d+)\.function\b"), r"tools.\1"),
    (re.compile(r"^tool_choice\.function\b"), "tool_choice"),
)
_MAX_TOKENS = re.compile(r"\bmax_(completion_)?tokens\b")


def as_chat(request: ResponsesRequest) -> ChatRequest:
    """Convert a request to a chat's. Raises RefusalError that names the field of the request."""
    chosen = request.tool_choice
    top = request.top_logprobs
    body: dict[str, Any] = {
        "model": request.model,
        "messages": _messages(request),
        "temperature": request.temperature,
        "top_p": request.top_p,
        "top_k": request.top_k,
        "seed": request.seed,
        "max_completion_tokens": request.max_output_tokens,
        "logprobs": request.with_logprobs,
        "top_logprobs": top if request.with_logprobs else None,
        "tools": [_tool(tool.model_dump(exclude={"type"}, exclude_none=True)) for tool in request.tools],
        "tool_choice": {"type": "function", "function": {"name": chosen.name}}
        if isinstance(chosen, NamedFunction)
        else chosen,
        "parallel_tool_calls": request.parallel_tool_calls,
        "response_format": _response_format(request),
        "stream": request.stream,
    }
    try:
        return ChatRequest.model_validate(body)
    except ValidationError as error:
        raise RefusalError(rename_fields(describe_invalid_request(error, ChatRequest.neutral).refused)) from None


def rename_fields(refused: Refused) -> Refused:
    """Return a chat's refusal with the names of a Responses request."""
    if refused.param is None:
        return refused
    name = refused.param
    for pattern, own in _NAMES:
        name = pattern.sub(own, name)
    message = refused.message
    if message.startswith(refused.param):
        message = name + message.removeprefix(refused.param)
    return replace(refused, param=name, message=_MAX_TOKENS.sub("max_output_tokens", message))


async def renamed(pieces: AsyncGenerator[list[AnswerPiece], None]) -> AsyncGenerator[list[AnswerPiece], None]:
    """Yield an answer's pieces. Raises its RefusalError with the names of a Responses request."""
    async with aclosing(pieces):
        try:
            async for some in pieces:
                yield some
        except RefusalError as error:
            raise RefusalError(rename_fields(error.refused)) from error


def _tool(function: dict[str, Any]) -> dict[str, Any]:
    return {"type": "function", "function": function}


def _response_format(request: ResponsesRequest) -> dict[str, Any] | None:
    wanted = request.text.format
    if wanted.type != "json_schema":
        return {"type": wanted.type}
    named = {"name": wanted.name, "schema": wanted.content, "strict": bool(wanted.strict)}
    return {"type": "json_schema", "json_schema": named}


def _messages(request: ResponsesRequest) -> list[dict[str, Any]]:
    """Return the messages of a chat: an answer's text and its calls, which are items of their own, are one message."""
    messages: list[dict[str, Any]] = []
    if request.instructions:
        messages.append({"role": "system", "content": request.instructions})
    for item in request.input:
        before = messages[-1] if messages else {}
        if isinstance(item, FunctionCallItem) and before.get("role") == "assistant":
            before["tool_calls"] = [*before.get("tool_calls", []), _call(item)]
        else:
            messages.append(_message(item))
    return messages


def _message(item: InputItem) -> dict[str, Any]:
    if isinstance(item, FunctionCallItem):
        return {"role": "assistant", "content": "", "tool_calls": [_call(item)]}
    if isinstance(item, FunctionResultItem):
        return {"role": "tool", "tool_call_id": item.call_id, "content": [_part(part) for part in item.output]}
    assert isinstance(item, MessageItem)
    return {"role": item.role, "content": [_part(part) for part in item.content]}


def _call(item: FunctionCallItem) -> dict[str, Any]:
    return {"id": item.call_id, "function": {"name": item.name, "arguments": item.arguments}}


def _part(part: Any) -> dict[str, Any]:
    if isinstance(part, InputImage):
        return {"type": "image_url", "image_url": {"url": part.image_url}}
    return {"type": "text", "text": part.refusal if isinstance(part, RefusalPart) else part.text}
