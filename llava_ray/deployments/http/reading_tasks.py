"""Conversion of requests that ask for no answer to tasks."""

from dataclasses import replace
from typing import Any

from pydantic import ValidationError

from llava_ray.chat.conversation import IMAGE_TOKEN
from llava_ray.deployments.http.complaints import describe_invalid_request
from llava_ray.deployments.http.reading_fields import DetokenizeRequest, EmbeddingsRequest, TokenizeRequest
from llava_ray.deployments.http.schema import ChatRequest, ImagePart
from llava_ray.deployments.messages import Task, chat_task, check_image_count, check_prompt_length
from llava_ray.deployments.reading_jobs import ReadingJob
from llava_ray.deployments.refusal import refuse
from llava_ray.deployments.settings import ServeSettings


def embeddings_task(request: EmbeddingsRequest, request_id: str, settings: ServeSettings) -> Task:
    """Convert a request for features to a task. Raises RefusalError."""
    field = "input" if request.input else "messages"
    job = ReadingJob("embed", features=request.features, field=field)
    if request.features != "language":
        parts = request.messages[0].parts if request.messages else ()
        media = tuple(part.image_url.url for part in parts if isinstance(part, ImagePart)) or _texts(request)
        check_image_count(media, settings, field)
        return Task(request_id, request.model, media=media, num_choices=len(media), stream=False, job=job)
    if request.messages:
        return replace(_chat({"model": request.model, "messages": request.messages}, request_id, settings), job=job)
    texts = _texts(request)
    ids = tuple(one for one in request.input if not isinstance(one, str))
    check_prompt_length(sum(map(len, request.input)), settings, field)
    for index, text in enumerate(texts):
        _check_markers(text, field if len(texts) == 1 else f"{field}.{index}")
    job = replace(job, texts=texts, token_ids=ids)
    return Task(request_id, request.model, num_choices=len(request.input), stream=False, job=job)


def tokenize_task(request: TokenizeRequest, model: str, request_id: str, settings: ServeSettings) -> Task:
    """Convert a request for tokens to a task. Raises RefusalError."""
    if request.prompt is not None:
        check_prompt_length(len(request.prompt), settings, "prompt")
        _check_markers(request.prompt, "prompt")
        job = ReadingJob("tokenize", add_special_tokens=request.add_special_tokens is not False, field="prompt")
        return Task(request_id, model, prompt=request.prompt, stream=False, job=job)
    fields = {
        "model": model,
        "messages": request.messages,
        "tools": request.tools,
        "tool_choice": request.tool_choice,
        "add_generation_prompt": request.add_generation_prompt,
        "continue_final_message": request.continue_final_message,
    }
    return replace(_chat(fields, request_id, settings), job=ReadingJob("tokenize"))


def detokenize_task(request: DetokenizeRequest, model: str, request_id: str, settings: ServeSettings) -> Task:
    """Convert a request for the text of tokens to a task. Raises RefusalError."""
    check_prompt_length(len(request.tokens), settings, "tokens")
    ids = (request.tokens,) if request.tokens else ()
    return Task(request_id, model, stream=False, job=ReadingJob("detokenize", token_ids=ids, field="tokens"))


def _texts(request: EmbeddingsRequest) -> tuple[str, ...]:
    return tuple(one for one in request.input if isinstance(one, str))


def _chat(fields: dict[str, Any], request_id: str, settings: ServeSettings) -> Task:
    """Convert the fields of a chat to its task. Raises RefusalError."""
    try:
        chat = ChatRequest.model_validate(fields)
    except ValidationError as error:
        raise describe_invalid_request(error, ChatRequest.neutral) from None
    return chat_task(chat, request_id, settings)


def _check_markers(text: str, field: str) -> None:
    """Check that a raw text has no place of an image. Raises RefusalError."""
    if IMAGE_TOKEN in text:
        raise refuse(400, f"{field}: {IMAGE_TOKEN} in a text; send images as parts of messages", "image_marker", field)
