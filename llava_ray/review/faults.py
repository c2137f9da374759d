"""Failures of requests to a judge: whether one may be billed, whether others can succeed, and the remedy."""

import os
import re
from collections.abc import Mapping
from typing import Any, Literal

import openai

from llava_ray.errors import JudgeError
from llava_ray.review.calls import JudgeSpec
from llava_ray.review.headers import Reported, read_headers

_Outcome = Literal["refused", "uncertain", "wasted"]
"""It was not billed; it may have been billed; it was billed and is useless."""
FaultKind = Literal["throttled", "trouble", "rejected", "fatal", "unparsed"]
"""Slow down; retry; this request is invalid; no request can succeed; the reply holds no scores."""

_NO_CREDIT = ("insufficient_quota", "billing_hard_limit_reached", "billing_not_active", "account_deactivated")
_OUR_MISTAKES = ("unsupported_parameter", "unsupported_value", "unknown_parameter", "model_not_found", "invalid_model")
_FATAL_STATUSES = (401, 402, 403, 404)
_GATEWAY_STATUSES = (408, 409, 502, 504)  # sent by a proxy in between: the judge may have answered
# By name: the client's versions use different HTTP libraries, httpx or httpx2, with equal names of errors.
_NOT_CONNECTED = ("ConnectError", "ConnectTimeout", "PoolTimeout", "ProxyError", "UnsupportedProtocol")
_MAX_REASON, _MAX_WORDS = 600, 300
# Errors of a single item, not of all requests.
_OF_THE_ITEM = re.compile(
    r"context.length|context.window|prompt is too long|content.(?:filter|management|policy)|moderation|safety system",
    re.IGNORECASE,
)
_OF_THE_KEY = re.compile(r"api.?key|authenticat|unauthori[sz]ed", re.IGNORECASE)
_TITLE = re.compile(r"<title[^>]*>([^<]{1,200})", re.IGNORECASE)
_STREAM = (b"data:", b"event:", b"id:", b":")


class RequestError(JudgeError):
    """A request without a usable reply.

    ``systematic``: the settings are the likely cause; if only such errors occur, no request will succeed.
    """

    def __init__(
        self,
        kind: FaultKind,
        outcome: _Outcome,
        reason: str,
        reported: Reported | None = None,
        systematic: bool = False,
    ) -> None:
        """Initialise the error."""
        super().__init__(reason)
        self.kind: FaultKind = kind
        self.outcome: _Outcome = outcome
        self.reason = reason[:_MAX_REASON]
        self.reported = reported or Reported()
        self.systematic = systematic

    def __reduce__(self) -> tuple[object, ...]:
        """Support pickling between Ray processes."""
        return type(self), (self.kind, self.outcome, self.reason, self.reported, self.systematic)


def status_fault(error: openai.APIStatusError, spec: JudgeSpec) -> RequestError:
    """Convert an HTTP error."""
    body = error.body if isinstance(error.body, dict) else {}
    message = body.get("message") or (error.body if isinstance(error.body, str) else error.message)
    reported = read_headers(error.response.headers)
    return error_fault(error.status_code, str(message), body, spec, reported, f"HTTP {error.status_code}: ")


def body_fault(data: Mapping[str, Any], spec: JudgeSpec, reported: Reported) -> RequestError:
    """Convert an error object in a reply with status 200."""
    error = data.get("error") or data
    body = error if isinstance(error, dict) else {"message": str(error)}
    code = body.get("code")
    status = code if isinstance(code, int) and 400 <= code < 600 else 400
    return error_fault(status, str(body.get("message") or body), body, spec, reported, "an error with HTTP 200: ")


def error_fault(
    status: int, message: str, body: Mapping[str, Any], spec: JudgeSpec, reported: Reported, prefix: str
) -> RequestError:
    """Convert a status and an error object, with the remedy."""
    codes = [str(body[name]) for name in ("code", "type") if body.get(name)]
    words = to_plain_line(message)
    told_codes = f" ({codes[0]})" if codes else ""
    reason = f"{prefix}{words}{told_codes}"
    remedy = _find_remedy(status, f"{words} {told_codes}", body, spec)
    if remedy:
        reason += f"; {remedy}"
    of_the_item = _OF_THE_ITEM.search(f"{words} {told_codes}") is not None
    ours = not of_the_item and (bool(remedy) or bool(set(codes) & set(_OUR_MISTAKES)))
    if set(codes) & set(_NO_CREDIT) or status in _FATAL_STATUSES or (status < 429 and ours):
        return RequestError("fatal", "refused", reason, reported)
    if (reported.retry_after_s or 0.0) > spec.config.patience_s:
        reason_with_wait = f"{reason}; it asks to wait {reported.retry_after_s:,.0f} s, longer than judge.patience_s"
        return RequestError("fatal", "refused", reason_with_wait, reported)
    if status in _GATEWAY_STATUSES:
        return RequestError("trouble", "uncertain", reason, reported)
    if status == 429 or status >= 500:
        return RequestError("throttled" if status == 429 else "trouble", "refused", reason, reported)
    return RequestError("rejected", "refused", reason, reported, systematic=not of_the_item)


def _find_remedy(status: int, words: str, body: Mapping[str, Any], spec: JudgeSpec) -> str:
    """Return the remedy for an error, or ""."""
    name = spec.config.api_key_env
    if set(map(str, body.values())) & set(_NO_CREDIT) or status == 402:
        return f"the account of the key in {name} has no credit: add some, and run the same command again to resume"
    if status in (401, 403) or (status == 400 and _OF_THE_KEY.search(words)):
        state = "it holds no valid key for this judge" if os.environ.get(name) else "it is not set"
        return f"see the environment variable {name} (judge.api_key_env): {state}"
    if status == 404 or str(body.get("code")) in ("model_not_found", "invalid_model"):
        return f"is judge.model = {spec.model!r} right, and {_address(spec)}?"
    return (
        _parameter_remedy(words, str(body.get("param") or ""), spec.config.max_tokens) if status in (400, 422) else ""
    )


def _parameter_remedy(words: str, param: str, max_tokens: int) -> str:
    """Return the remedy for a rejected parameter, or ""."""
    if _OF_THE_ITEM.search(words):
        return ""
    supported = re.search(r"use .?(max_tokens|max_completion_tokens)\b", words, re.IGNORECASE)
    if supported:
        return f'set judge.token_limit_name = "{supported[1]}"'
    for setting, (pattern, remedy) in _PARAMETERS.items():
        if param == setting or (not param and re.search(pattern, words, re.IGNORECASE)):
            other = "max_completion_tokens" if setting == "max_tokens" else "max_tokens"
            return remedy.format(max_tokens=max_tokens, other=other)
    return ""


# By parameter: the pattern of messages without a "param" field, and the remedy.
_PARAMETERS = {
    "max_tokens": (
        r"\bmax_tokens\b",
        'lower judge.max_tokens = {max_tokens}, or set judge.token_limit_name = "{other}"',
    ),
    "max_completion_tokens": (
        r"\bmax_completion_tokens\b",
        'lower judge.max_tokens = {max_tokens}, or set judge.token_limit_name = "{other}"',
    ),
    "temperature": (r"\btemperature\b", "set judge.temperature = 1"),
    "seed": (r"\bseed\b", "leave judge.seed out"),
    "response_format": (r"response_format|json_schema", 'set judge.response_format = "text"'),
}


def content_fault(content: bytes, spec: JudgeSpec | None, reported: Reported, why: str) -> RequestError:
    """Convert a reply with status 200 that is no chat completion."""
    start = content.lstrip()[:6].lower()
    where = _address(spec) if spec else "is judge.base_url right"
    if start.startswith(b"<"):
        page = to_plain_line(content[:20_000].decode("utf-8", "replace"))
        return RequestError("trouble", "refused", f"no chat completion but {page}; {where}?", reported, True)
    if start and not start.startswith((b"{", b"[", *_STREAM)):
        text = to_plain_line(content[:1000].decode("utf-8", "replace"))
        return RequestError("trouble", "refused", f"no chat completion but {text[:80]!r}; {where}?", reported, True)
    reason = f"the reply is no chat completion: {why}; {where}?"
    return RequestError("trouble", "uncertain", reason, reported, True)


def connection_fault(error: openai.APIConnectionError, spec: JudgeSpec) -> RequestError:
    """Convert a connection error: whether the request may have arrived."""
    cause = error.__cause__
    reason = to_plain_line(f"{type(cause or error).__name__}: {cause or error}")
    if type(cause).__name__ in _NOT_CONNECTED:
        return RequestError("trouble", "refused", f"not connected to {spec.base_url}: {reason}")
    return RequestError("trouble", "uncertain", f"connection lost: {reason}")


def _address(spec: JudgeSpec) -> str:
    """Return a question about the configured address, for messages."""
    return f'is judge.base_url = "{spec.base_url}" right, up to and including /v1'


def to_plain_line(text: str) -> str:
    """Return a server's message as one printable line; the title of a web page."""
    if re.match(r"\s*<(?:!doctype|html|head|body|\?xml|!--)", text, re.IGNORECASE) or "</html>" in text.lower():
        title = _TITLE.search(text)
        return f"a web page ({to_plain_line(title[1])})" if title else "a web page"
    printable = "".join(letter if letter.isprintable() else " " for letter in text[: 4 * _MAX_WORDS])
    printable = " ".join(printable.split())
    return printable if len(printable) <= _MAX_WORDS else f"{printable[:_MAX_WORDS]}…"
