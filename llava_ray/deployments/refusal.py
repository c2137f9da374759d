"""Error responses: a status and OpenAI's error object."""

import re
from dataclasses import dataclass, field
from typing import Any

from llava_ray.errors import LlavaRayError, RecordError

# OpenAI's error type of each status.
_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    422: "invalid_request_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}


_MAX_CHARS = 1000  # of a message

# Reasons of RecordErrors whose messages are about the request itself.
_PASSED_THROUGH = frozenset(
    {
        "sampling", "empty_prompt", "too_long", "system_prompt", "turns", "model", "engine", "structured_output",
        "tools", "control_tokens", "tokens",
    }
)  # fmt: skip

# The messages to clients for other reasons; ``{name}`` is, for example, "image 2".
_CLIENT_MESSAGES = {
    "image_count": "the images of the messages and their places in the text do not agree; "
    'send each as a part {{"type": "image_url", …}} and leave markers out of the text',
    "image_too_large": "{name} has too many pixels; send a smaller one",
    "image_too_many_frames": "{name} has too many frames; send one of them",
    "image_truncated": "{name} is cut off or damaged; send it whole",
    "image_unreadable": "{name} is not an image that can be read; "
    "send JPEG, PNG, WebP, GIF, BMP, TIFF, JPEG 2000, AVIF or PPM, of 8 or 16 bits a channel",
    "plain_turns": "this model only captions: send one question with an image, not a conversation",
    "alternation": "user and assistant must alternate, the user first and last",
    "no_turns": "there is no message to answer; send one of the user's",
    "template": "this model's chat template cannot write these messages; send plainer or fewer ones",
}


@dataclass(frozen=True)
class Refused:
    """The reason why there is no answer. A value, not an exception, so that it can cross processes."""

    status: int
    """HTTP's, 400 and above."""
    message: str
    """What was found, what was expected, and the remedy, with short excerpts of the payload at most."""
    code: str
    """One machine-readable word."""
    param: str | None = None
    """The field of the request."""
    retry_after_s: int | None = None
    """Seconds until a retry makes sense."""

    def body(self) -> dict[str, Any]:
        """Return OpenAI's error object."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        param = None if self.param is None else _printable(self.param)
        return {"error": {"message": _printable(self.message), "type": kind, "param": param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        """Return the response's headers."""
        headers = {} if self.retry_after_s is None else {"retry-after": str(self.retry_after_s)}
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        if (
            self.status in (408, 413) or self.code == "too_many_bytes_in_flight"
        ):  # the rest of the body would otherwise be read as the next request
            headers["connection"] = "close"
        return headers


@dataclass
class RefusalError(LlavaRayError):
    """An exception that carries a Refused to where the response is written."""

    refused: Refused = field()

    def __post_init__(self) -> None:
        """Set the exception's message."""
        super().__init__(self.refused.message)


def refuse(status: int, message: str, code: str, param: str | None = None) -> RefusalError:
    """Build a RefusalError."""
    return RefusalError(Refused(status, message, code, param))


def _printable(text: str) -> str:
    """Return a text as valid UTF-8 of bounded length."""
    return text[:_MAX_CHARS].encode("utf-8", "replace").decode()


def from_record_error(error: RecordError, param: str = "messages") -> Refused:
    """Convert a RecordError to a refusal with the same reason.

    The errors' own messages address users with data or a model at hand; a client has neither.
    """
    param = error.field or param
    if error.reason in _PASSED_THROUGH:
        return Refused(400, str(error), error.reason, param)
    image = re.match(r"image \d+", str(error))
    name = image[0] if image else "the conversation"
    words = _CLIENT_MESSAGES.get(error.reason, f"{name} cannot be used ({error.reason}); send another")
    return Refused(400, words.format(name=name), error.reason, param)
