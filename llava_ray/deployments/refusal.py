"""What a request is answered with when it is not answered: a status and OpenAI's error object."""

from dataclasses import dataclass, field
from typing import Any

from llava_ray.errors import LlavaRayError, RecordError

# OpenAI's word for each family of errors.
TYPES = {
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
        kind = TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

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


def from_record_error(error: RecordError, param: str = "messages") -> Refused:
    """Say what a request got wrong, under the reason that the error already counts by."""
    return Refused(400, str(error), error.reason, param)
