"""Bodies of requests: read whole within a size, a time and the bytes of all, or passed on within them."""

import asyncio

from starlette.datastructures import Headers
from starlette.types import Message, Receive

from llava_ray.deployments.http.limits import HeldAmounts, too_many_bytes_in_flight
from llava_ray.deployments.refusal import RefusalError, Refused

_MAX_DIGITS = 20  # of a declared length that are looked at


class RefusedBodyError(RefusalError):
    """A body that is refused before any route has seen it."""


def _declared_bytes(headers: Headers) -> int:
    """Return how long a body is by its header; 0 if that says no number."""
    declared = headers.get("content-length", "0")
    # "²" is a digit to Python, and thousands of digits are no number to it.
    return int(declared[:_MAX_DIGITS]) if declared.isascii() and declared.isdigit() else 0


def _too_slow(timeout_s: float) -> Refused:
    """Return the refusal of a body that does not arrive."""
    return Refused(408, f"the body did not arrive within {timeout_s:g} s (body_timeout_s)", "body_timeout")


class BodyReading:
    """Reads one body, and holds its bytes against the limits of all until it is released."""

    def __init__(self, max_bytes: int, setting: str, bytes_in_flight: HeldAmounts, holder: str) -> None:
        """Read at most ``max_bytes``, which ``setting`` says; ``holder`` is a key's name or an address."""
        self.max_bytes = max_bytes
        self.setting = setting
        self.bytes_in_flight = bytes_in_flight
        self.holder = holder
        self.held = 0
        self.refused: Refused | None = None

    async def read(self, headers: Headers, receive: Receive, timeout_s: float) -> bytes | None:
        """Return the body; None if the client has gone. Raises RefusedBodyError."""
        try:
            async with asyncio.timeout(timeout_s):
                return await self.read_chunks(headers, receive)
        except TimeoutError:
            raise RefusedBodyError(_too_slow(timeout_s)) from None

    async def read_chunks(self, headers: Headers, receive: Receive) -> bytes | None:
        """Read until the end or the first byte too many."""
        self.hold(_declared_bytes(headers))
        chunks, num_bytes = [], 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            chunk = message.get("body", b"")
            chunks.append(chunk)
            num_bytes += len(chunk)
            self.hold(num_bytes)
            if not message.get("more_body", False):
                return b"".join(chunks)

    def hold(self, num_bytes: int) -> None:
        """Hold so many bytes in all. Raises RefusedBodyError for too many."""
        if num_bytes > self.max_bytes:
            message = f"a body of {num_bytes:,} bytes; at most {self.max_bytes:,} ({self.setting})"
            raise RefusedBodyError(Refused(413, message, "body_too_large"))
        more = num_bytes - self.held
        if more <= 0:
            return
        if not self.bytes_in_flight.take(self.holder, more):
            raise RefusedBodyError(too_many_bytes_in_flight(self.bytes_in_flight))
        self.held = num_bytes

    def release(self) -> None:
        """Give the bytes back."""
        if self.held:
            self.bytes_in_flight.release(self.holder, self.held)
            self.held = 0


def passed_on(reading: BodyReading, headers: Headers, receive: Receive, timeout_s: float) -> Receive:
    """Pass a body on as it comes, until it is too long or too slow; then, for the app, its client has gone.

    ``reading`` holds what has come, and says in ``refused`` what was wrong. Raises RefusedBodyError for what the
    header announces.
    """
    reading.hold(_declared_bytes(headers))
    deadline: float | None = asyncio.get_running_loop().time() + timeout_s  # None once the body is whole
    num_bytes = 0

    async def receive_held() -> Message:
        nonlocal num_bytes, deadline
        try:
            async with asyncio.timeout_at(deadline):
                message = await receive()
            num_bytes += len(message.get("body", b""))
            reading.hold(num_bytes)
        except TimeoutError:
            reading.refused = _too_slow(timeout_s)
        except RefusedBodyError as error:
            reading.refused = error.refused
        if reading.refused is not None:
            return {"type": "http.disconnect"}
        if not message.get("more_body", False):
            deadline = None
        return message

    return receive_held


def replayed(body: bytes, receive: Receive) -> Receive:
    """Give the body once, then whatever else comes: a client that leaves."""
    pending: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive_again() -> Message:
        while not pending:
            message = await receive()
            if message["type"] == "http.disconnect":
                return message
        return pending.pop()

    return receive_again
