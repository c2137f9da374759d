"""What a request is answered with when it is not answered: a status and OpenAI's error object."""

import re
from dataclasses import dataclass, field
from typing import Any

from llava_ray.errors import LlavaRayError, RecordError

# OpenAI's word for each family of errors.
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

# Reasons of RecordErrors whose words are about the request itself.
_TOLD_AS_THEY_ARE = frozenset({"sampling", "empty_prompt", "too_long", "system_prompt", "turns", "model", "engine"})

# What a client is told for the others; ``{name}`` is "image 2", say.
_SAID = {
    "image_count": "the images of the messages and their places in the text do not agree; "
    'send each as a part {{"type": "image_url", …}} and leave markers out of the text',
    "image_too_large": "{name} has too many pixels; send a smaller one",
    "image_too_many_frames": "{name} has too many frames; send one of them",
    "image_truncated": "{name} is cut off or damaged; send it whole",
    "image_unreadable": "{name} is not an image that can be read; "
    "send JPEG, PNG, WebP, GIF, BMP, TIFF, JPEG 2000, AVIF or PPM, of 8 or 16 bits a channel",
    "plain_turns": "this model takes one question that holds an image, and no conversation: it only captions",
    "alternation": "user and assistant must alternate, the user first and last",
    "no_turns": "there is no message to answer; send one of the user's",
    "template": "this model's chat template cannot write these messages; send plainer or fewer ones",
}


@dataclass(frozen=True)
class Refused:
    """Why there is no answer. A value, not an exception, where it crosses from one process to another."""

    status: int
    """HTTP's, 400 and above."""
    message: str
    """What was found, what was expected, what to do. Holds nothing of a payload but short excerpts."""
    code: str
    """One machine-readable word."""
    param: str | None = None
    """The field of the request that it is about."""
    retry_after_s: int | None = None
    """When to try again."""

    def body(self) -> dict[str, Any]:
        """Return OpenAI's error object."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        param = None if self.param is None else _speakable(self.param)
        return {"error": {"message": _speakable(self.message), "type": kind, "param": param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        """Return what goes beside it."""
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
    """Carries a Refused up to where the response is written."""

    refused: Refused = field()

    def __post_init__(self) -> None:
        """Say the message."""
        super().__init__(self.refused.message)


def refuse(status: int, message: str, code: str, param: str | None = None) -> RefusalError:
    """Return the error to raise."""
    return RefusalError(Refused(status, message, code, param))


def _speakable(text: str) -> str:
    """Return a text that is valid UTF-8 and not endless, whatever a path or a library's message held."""
    return text[:_MAX_CHARS].encode("utf-8", "replace").decode()


def from_record_error(error: RecordError, param: str = "messages") -> Refused:
    """Say what a request got wrong, under the reason that the error already counts by.

    The errors' own words are for those who have data or a model in their hands; a client has neither.
    """
    if error.reason in _TOLD_AS_THEY_ARE:
        return Refused(400, str(error), error.reason, param)
    image = re.match(r"image \d+", str(error))
    name = image[0] if image else "the conversation"
    words = _SAID.get(error.reason, f"{name} cannot be used ({error.reason}); send another")
    return Refused(400, words.format(name=name), error.reason, param)
