"""The page's chat: conversion of Gradio's messages to requests and exports, and the metrics of answers."""

import base64
import json
import mimetypes
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from llava_ray.deployments.chat_page.uploads import Uploads
from llava_ray.deployments.http.responses import Choice
from llava_ray.deployments.http.schema import ChatRequest, describe_invalid_request
from llava_ray.deployments.replica import AnswerPiece

# One message of the chatbot: {"role": …, "content": text, or {"path": file}}.
ChatbotMessage = Mapping[str, Any]

CURSOR = "▌"  # at the end of an answer that is being written, as the original's page has it


@dataclass(frozen=True)
class Parameters:
    """The parameters set on the page."""

    model: str
    temperature: float = 0.2
    top_p: float = 0.7
    max_tokens: int = 512


def to_user_messages(box: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Convert the contents of the text box to messages: its images, then its text."""
    files = [{"role": "user", "content": {"path": path}} for path in box.get("files") or ()]
    text = str(box.get("text") or "").strip()
    return [*files, {"role": "user", "content": text}] if text else files


def pieces_of(message: ChatbotMessage) -> list[Any]:
    """Return a message's content as texts and ``{"path": …}``, whichever of Gradio's forms it has."""
    content = message["content"]
    found: list[Any] = []
    for part in content if isinstance(content, list) else [content]:
        if isinstance(part, str):
            found.append(part)
        elif part.get("type") == "text":
            found.append(part["text"])
        else:
            found.append({"path": (part.get("file") or part)["path"]})
    return found


def paths_of(history: Sequence[ChatbotMessage]) -> list[str]:
    """Return the paths of a chat's images, in order."""
    return [piece["path"] for message in history for piece in pieces_of(message) if not isinstance(piece, str)]


def openai_messages(history: Sequence[ChatbotMessage], uploads: Uploads) -> list[dict[str, Any]]:
    """Join neighbouring messages of one role, and put images into them as data URIs.

    Raises RefusalError for more images or bytes than a request may have, before any is read.
    """
    files = uploads.read_all(paths_of(history))
    joined: list[dict[str, Any]] = []
    for message in history:
        if not joined or joined[-1]["role"] != message["role"]:
            joined.append({"role": message["role"], "content": []})
        for piece in pieces_of(message):
            if isinstance(piece, str):
                joined[-1]["content"].append({"type": "text", "text": piece})
            else:
                url = _data_uri(piece["path"], files[piece["path"]])
                joined[-1]["content"].append({"type": "image_url", "image_url": {"url": url}})
    return joined


def chat_request(history: Sequence[ChatbotMessage], parameters: Parameters, uploads: Uploads) -> ChatRequest:
    """Return the request that the API would get for this chat. Raises RefusalError as the API does."""
    try:
        return ChatRequest.model_validate(
            {
                "model": parameters.model,
                "messages": openai_messages(history, uploads),
                "temperature": parameters.temperature,
                "top_p": parameters.top_p,
                "max_tokens": int(parameters.max_tokens),
                "stream": True,
            }
        )
    except ValidationError as error:
        raise describe_invalid_request(error) from None


def export(history: Sequence[ChatbotMessage], parameters: Parameters, uploads: Uploads) -> str:
    """Format a chat as the body of an API request, which can be sent again. Raises RefusalError."""
    return json.dumps(
        {
            "model": parameters.model,
            "temperature": parameters.temperature,
            "top_p": parameters.top_p,
            "max_tokens": int(parameters.max_tokens),
            "messages": openai_messages(history, uploads),
        },
        indent=1,
        ensure_ascii=False,
    )


def _data_uri(path: str, data: bytes) -> str:
    """Format a file's content as a data URI."""
    kind = mimetypes.guess_type(path)[0] or "application/octet-stream"
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def last_question(history: Sequence[ChatbotMessage]) -> int:
    """Return the index of the last question; the length of the history if there is none."""
    index = len(history)
    while index and history[index - 1]["role"] == "assistant":
        index -= 1
    begin = index
    while begin and history[begin - 1]["role"] == "user":
        begin -= 1
    return begin if begin < index else len(history)


@dataclass
class AnswerMetrics:
    """Times and counts of one answer, for the line under the chat."""

    started: float = field(default_factory=time.monotonic)
    first: float | None = None
    last: float | None = None
    answer: Choice = field(default_factory=Choice)

    def add(self, pieces: Sequence[AnswerPiece]) -> None:
        """Add pieces of the answer."""
        for _, chunk in pieces:
            self.answer.add(chunk)
            self.last = time.monotonic()
            if self.first is None and chunk.token_ids:
                self.first = self.last

    def __str__(self) -> str:
        """Format the metrics in one line."""
        if self.first is None or self.last is None:
            return ""
        num_tokens, seconds = self.answer.num_tokens, self.last - self.first
        speed = f", {(num_tokens - 1) / seconds:.0f} tokens/s" if num_tokens > 1 and seconds > 0 else ""
        end = " (max tokens reached)" if self.answer.finish_reason == "length" else ""
        return (
            f"{self.answer.num_prompt_tokens} tokens read, {num_tokens} written{end} · "
            f"first after {self.first - self.started:.2f} s{speed}"
        )
