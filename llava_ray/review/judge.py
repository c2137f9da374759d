"""One request to a judge over OpenAI's API: its reply, or a fault that says whether it may have been paid."""

import asyncio
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, Self

import openai
from openai import AsyncOpenAI

from llava_ray.errors import JudgeError
from llava_ray.review.calls import JudgeSpec
from llava_ray.review.headers import Reported, read_headers

Outcome = Literal["refused", "uncertain", "wasted"]
"""It cost nothing; it may have been paid; it was paid and is of no use."""
Kind = Literal["throttled", "trouble", "rejected", "fatal", "unparsed"]
"""Come back later; try again; this request is bad; no request can succeed; the reply holds no scores."""

NO_KEY = "none"
FATAL_CODES = ("insufficient_quota", "billing_hard_limit_reached", "account_deactivated")
FATAL_STATUSES = (401, 403, 404)
GATEWAY_STATUSES = (408, 409, 502, 504)  # said by something in between: the judge may have answered
# By name: the client's versions bring different HTTP libraries, httpx or httpx2, which call these errors the same.
NOT_CONNECTED = ("ConnectError", "ConnectTimeout", "PoolTimeout")
MAX_REASON = 300


@dataclass(frozen=True)
class Usage:
    """Tokens as the endpoint counts them; ``cached`` ones are among the prompt's."""

    prompt: int = 0
    cached: int = 0
    output: int = 0


@dataclass(frozen=True)
class Reply:
    """What a judge said, and what it took."""

    content: str
    usage: Usage | None
    model: str
    fingerprint: str
    finish_reason: str
    reported: Reported = field(default_factory=Reported)


class RequestError(JudgeError):
    """A request that brought no reply that could be used."""

    def __init__(self, kind: Kind, outcome: Outcome, reason: str, reported: Reported | None = None) -> None:
        """Keep what it means."""
        super().__init__(reason)
        self.kind: Kind = kind
        self.outcome: Outcome = outcome
        self.reason = reason[:MAX_REASON]
        self.reported = reported or Reported()

    def __reduce__(self) -> tuple[object, ...]:
        """Survive pickling between Ray processes."""
        return type(self), (self.kind, self.outcome, self.reason, self.reported)


class Judge(Protocol):
    """Whoever answers a chat completion."""

    async def ask(self, body: Mapping[str, Any]) -> Reply:
        """Send one request, once. Raises RequestError."""
        ...

    async def close(self) -> None:
        """Hang up."""
        ...


class OpenAIJudge:
    """A judge behind an OpenAI-compatible endpoint."""

    def __init__(self, client: AsyncOpenAI, timeout_s: float) -> None:
        """Keep the client."""
        self.client = client
        self.timeout_s = timeout_s

    @classmethod
    def connect(cls, spec: JudgeSpec) -> Self:
        """Make a client that sends a request once: who may send again is decided elsewhere."""
        return cls(
            AsyncOpenAI(
                base_url=spec.base_url,
                api_key=os.environ.get(spec.config.api_key_env) or NO_KEY,
                max_retries=0,
                timeout=spec.config.timeout_s,
            ),
            spec.config.timeout_s,
        )

    async def ask(self, body: Mapping[str, Any]) -> Reply:
        """Send one request, once. Raises RequestError."""
        try:
            # The client's own timeout starts anew with every piece of a slow body.
            async with asyncio.timeout(self.timeout_s):
                raw = await self.client.chat.completions.with_raw_response.create(**body)
        except TimeoutError as error:
            raise RequestError("trouble", "uncertain", f"no reply within {self.timeout_s:g} s") from error
        except openai.APIStatusError as error:
            raise status_fault(error) from error
        except openai.APIConnectionError as error:
            raise connection_fault(error) from error
        return read_reply(raw.http_response.content, read_headers(raw.headers))

    async def close(self) -> None:
        """Hang up."""
        await self.client.close()


def read_reply(content: bytes, reported: Reported) -> Reply:
    """Read a chat completion. Raises RequestError: what came may have been paid."""
    try:
        data = json.loads(content)
        choice = data["choices"][0]
        text = choice["message"]["content"] or choice["message"].get("refusal") or ""
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise RequestError("trouble", "uncertain", f"the reply is no chat completion: {error!r}", reported) from error
    if not isinstance(text, str):
        raise RequestError("trouble", "uncertain", "the reply's content is no text", reported)
    return Reply(
        text,
        read_usage(data.get("usage")),
        str(data.get("model") or ""),
        str(data.get("system_fingerprint") or ""),
        str(choice.get("finish_reason") or ""),
        reported,
    )


def read_usage(usage: Any) -> Usage | None:
    """Return the tokens that a reply reports; None where it reports none."""
    if not isinstance(usage, dict):
        return None
    details = usage.get("prompt_tokens_details")
    cached = details.get("cached_tokens") if isinstance(details, dict) else None
    numbers = (usage.get("prompt_tokens"), cached or 0, usage.get("completion_tokens") or 0)
    return Usage(*numbers) if all(isinstance(number, int) for number in numbers) else None  # type: ignore[arg-type]


def status_fault(error: openai.APIStatusError) -> RequestError:
    """Say what an HTTP error means."""
    status, reported = error.status_code, read_headers(error.response.headers)
    body = error.body if isinstance(error.body, dict) else {}
    code = str(body.get("code") or body.get("type") or "")
    reason = f"HTTP {status}: {body.get('message') or error.message}" + (f" ({code})" if code else "")
    if code in FATAL_CODES or status in FATAL_STATUSES:
        return RequestError("fatal", "refused", reason, reported)
    if status == 429:
        return RequestError("throttled", "refused", reason, reported)
    if status in GATEWAY_STATUSES:
        return RequestError("trouble", "uncertain", reason, reported)
    if status >= 500:
        return RequestError("trouble", "refused", reason, reported)
    return RequestError("rejected", "refused", reason, reported)


def connection_fault(error: openai.APIConnectionError) -> RequestError:
    """Say whether a request without a reply can have arrived."""
    cause = error.__cause__
    reason = f"{type(cause or error).__name__}: {cause or error}"
    if type(cause).__name__ in NOT_CONNECTED:
        return RequestError("trouble", "refused", f"not connected: {reason}")
    return RequestError("trouble", "uncertain", f"connection lost: {reason}")
