"""One request to a judge over OpenAI's API: its reply, or an error that says whether it may have been billed."""

import asyncio
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, Self

import openai
from openai import AsyncOpenAI

from llava_ray.review.calls import JudgeSpec
from llava_ray.review.faults import RequestError, body_fault, connection_fault, content_fault, status_fault
from llava_ray.review.headers import Reported, read_headers

NO_KEY = "none"
_MAX_TOKENS = 2**40  # a larger count is invalid


@dataclass(frozen=True)
class Usage:
    """Tokens as the endpoint counts them; ``cached`` ones are among the prompt's."""

    prompt: int = 0
    cached: int = 0
    output: int = 0


@dataclass(frozen=True)
class JudgeReply:
    """A judge's reply with its usage."""

    content: str
    usage: Usage | None
    model: str
    fingerprint: str
    finish_reason: str
    reported: Reported = field(default_factory=Reported)


class JudgeClient(Protocol):
    """A client for chat completions."""

    async def ask(self, body: Mapping[str, Any]) -> JudgeReply:
        """Send one request without retries. Raises RequestError."""
        ...

    async def close(self) -> None:
        """Close the connections."""
        ...


class OpenAIJudge:
    """A judge behind an OpenAI-compatible endpoint."""

    def __init__(self, client: AsyncOpenAI, spec: JudgeSpec) -> None:
        """Initialise with a client."""
        self.client = client
        self.spec = spec
        self.timeout_s = spec.config.timeout_s

    @classmethod
    def connect(cls, spec: JudgeSpec) -> Self:
        """Build a judge whose client does not retry: retries need a new lease."""
        return cls(
            AsyncOpenAI(
                base_url=spec.base_url,
                api_key=os.environ.get(spec.config.api_key_env) or NO_KEY,
                max_retries=0,
                timeout=spec.config.timeout_s,
            ),
            spec,
        )

    async def ask(self, body: Mapping[str, Any]) -> JudgeReply:
        """Send one request without retries. Raises RequestError."""
        try:
            # The client's own timeout restarts with every chunk of a slow body.
            async with asyncio.timeout(self.timeout_s):
                raw = await self.client.chat.completions.with_raw_response.create(**body)
        except TimeoutError as error:
            raise RequestError("trouble", "uncertain", f"no reply within {self.timeout_s:g} s") from error
        except openai.APIStatusError as error:
            raise status_fault(error, self.spec) from error
        except openai.APIConnectionError as error:
            raise connection_fault(error, self.spec) from error
        return read_reply(raw.http_response.content, read_headers(raw.headers), self.spec)

    async def close(self) -> None:
        """Close the connections."""
        await self.client.close()


def read_reply(content: bytes, reported: Reported, spec: JudgeSpec | None = None) -> JudgeReply:
    """Parse a chat completion. Raises RequestError, since an invalid reply may have been billed."""
    try:
        data = json.loads(content)
        if spec and isinstance(data, dict) and "choices" not in data and ("error" in data or "message" in data):
            raise body_fault(data, spec, reported)
        choice = data["choices"][0]
        text = _read_reply_text(choice["message"]["content"]) or choice["message"].get("refusal") or ""
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
        raise content_fault(content, spec, reported, f"{type(error).__name__}: {error}"[:200]) from error
    if not isinstance(text, str):
        raise content_fault(content, spec, reported, "its content is no text")
    return JudgeReply(
        _valid_utf8(text),
        read_usage(data.get("usage")),
        _valid_utf8(str(data.get("model") or "")),
        _valid_utf8(str(data.get("system_fingerprint") or "")),
        _valid_utf8(str(choice.get("finish_reason") or "")),
        reported,
    )


def _read_reply_text(content: Any) -> Any:
    """Return a reply's text; the joined text parts if there are several."""
    if not isinstance(content, list):
        return content
    return "".join(part["text"] for part in content if part["type"] == "text")


def _valid_utf8(text: str) -> str:
    """Replace lone surrogates by question marks, so that files can hold the text."""
    return text.encode("utf-8", "replace").decode()


def read_usage(usage: Any) -> Usage | None:
    """Parse the tokens that a reply reports; None if it reports none."""
    if not isinstance(usage, dict):
        return None
    details = usage.get("prompt_tokens_details")
    cached = details.get("cached_tokens") if isinstance(details, dict) else None
    numbers: tuple[Any, ...] = (usage.get("prompt_tokens"), cached or 0, usage.get("completion_tokens") or 0)
    if not all(type(number) is int and 0 <= number <= _MAX_TOKENS for number in numbers):
        return None
    prompt, cached, output = numbers
    return Usage(prompt, min(prompt, cached), output)
