"""Request bodies, read or forwarded within limits of size, time and total bytes in flight."""

import asyncio

from starlette.datastructures import Headers
from starlette.types import Message, Receive

from llava_ray.deployments.http.limits import HeldAmounts, too_many_bytes_in_flight
from llava_ray.deployments.refusal import RefusalError, Refused

_MAX_DIGITS = 20  # of a declared length that are parsed


class RefusedBodyError(RefusalError):
    """A body that is rejected before its route runs."""


def _declared_bytes(headers: Headers) -> int:
    """Return a body's length by its header; 0 if it is no number."""
    declared = headers.get("content-length", "0")
    # For Python "²" is a digit, and int() rejects thousands of digits.
    return int(declared[:_MAX_DIGITS]) if declared.isascii() and declared.isdigit() else 0


def _too_slow(timeout_s: float) -> Refused:
    """Return the refusal of a body that arrives too slowly."""
    return Refused(408, f"the body did not arrive within {timeout_s:g} s (body_timeout_s)", "body_timeout")


class BodyReading:
    """The reading of one body, whose bytes count against the limits until it is released."""

    def __init__(self, max_bytes: int, setting: str, bytes_in_flight: HeldAmounts, holder: str) -> None:
        """Initialise with the limit ``max_bytes`` of ``setting``; ``holder`` is a key's name or an address."""
        self.max_bytes = max_bytes
        self.setting = setting
        self.bytes_in_flight = bytes_in_flight
        self.holder = holder
        self.held = 0
        self.refused: Refused | None = None

    async def read(self, headers: Headers, receive: Receive, timeout_s: float) -> bytes | None:
        """Return the body; None if the client disconnected. Raises RefusedBodyError."""
        try:
            async with asyncio.timeout(timeout_s):
                return await self.read_chunks(headers, receive)
        except TimeoutError:
            raise RefusedBodyError(_too_slow(timeout_s)) from None

    async def read_chunks(self, headers: Headers, receive: Receive) -> bytes | None:
        """Read until the end or the limit."""
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
        """Count so many bytes in total. Raises RefusedBodyError for too many."""
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
        """Release the bytes."""
        if self.held:
            self.bytes_in_flight.release(self.holder, self.held)
            self.held = 0


def forward_body(reading: BodyReading, headers: Headers, receive: Receive, timeout_s: float) -> Receive:
    """Forward a body as it arrives; once it is too long or too slow the app sees a disconnect.

    ``reading`` counts the bytes, and has the reason in ``refused``. Raises RefusedBodyError for a declared length
    over the limit.
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


def replay_body(body: bytes, receive: Receive) -> Receive:
    """Return a receive function that gives the body once, and then waits for a disconnect."""
    pending: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive_again() -> Message:
        while not pending:
            message = await receive()
            if message["type"] == "http.disconnect":
                return message
        return pending.pop()

    return receive_again
