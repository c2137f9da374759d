"""What stands in front of every route: who asks, how much is sent, how long it takes; refused as early as can be."""

import asyncio
import json
from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llava_ray.deployments.auth import ApiKey, Guard
from llava_ray.deployments.refusal import RefusalError, Refused

# Where a key is asked for. The rest is health, or the page, whose own login asks for it.
GUARDED = ("/v1/", "/metrics")
COUNTED = "/v1/"

MAX_DIGITS = 20  # of a declared length that are looked at


def route_path(scope: Scope) -> str:
    """Return the path that routes are matched by: without the prefix under which Serve mounts the application."""
    path, prefix = str(scope["path"]), str(scope.get("root_path", ""))
    rest = path.removeprefix(prefix)
    return rest if rest.startswith("/") or not rest else path


async def send_refused(refused: Refused, send: Send) -> None:
    """Answer with a refusal."""
    body = json.dumps(refused.body()).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body)), **refused.headers()}
    await send(
        {
            "type": "http.response.start",
            "status": refused.status,
            "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
        }
    )
    await send({"type": "http.response.body", "body": body})


class AuthMiddleware:
    """Asks for a key before a byte of the body is read; ``scope["api_key"]`` is who came in."""

    def __init__(
        self, app: ASGIApp, guard: Guard, on_refused: Callable[[Refused], None] = lambda refused: None
    ) -> None:
        """Guard ``app``."""
        self.app = app
        self.guard = guard
        self.on_refused = on_refused

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let the request through, or answer 401 or 429."""
        if scope["type"] != "http" or not route_path(scope).startswith(GUARDED) or scope["method"] == "OPTIONS":
            await self.app(scope, receive, send)
            return
        found = self.check(Headers(scope=scope).get("authorization", ""), counted=route_path(scope).startswith(COUNTED))
        if isinstance(found, Refused):
            self.on_refused(found)
            await send_refused(found, send)
            return
        scope["api_key"] = found
        await self.app(scope, receive, send)

    def check(self, authorization: str, *, counted: bool) -> ApiKey | Refused:
        """Return who asks, or why they may not."""
        found = self.guard.identify(authorization)
        if isinstance(found, Refused) or not counted:
            return found
        return self.guard.admit(found) or found


class BodyMiddleware:
    """Reads the bodies of the API whole, within a size and a time, before the route runs.

    What the page sends is only counted on its way: Gradio reads it in its own ways, and bounds each file.
    """

    def __init__(
        self,
        app: ASGIApp,
        max_bytes: int,
        timeout_s: float,
        max_page_bytes: int,
        on_refused: Callable[[Refused], None] = lambda refused: None,
    ) -> None:
        """Keep the limits."""
        self.app = app
        self.max_bytes = max_bytes
        self.timeout_s = timeout_s
        self.max_page_bytes = max_page_bytes
        self.on_refused = on_refused

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let the request through with its body, or answer 413 (from the header alone, if it says so) or 408."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if not route_path(scope).startswith(GUARDED):
            await self.app(scope, counted(receive, self.max_page_bytes), send)
            return
        try:
            async with asyncio.timeout(self.timeout_s):
                body = await self.read(Headers(scope=scope), receive)
        except RefusalError as error:
            await self.refuse(error.refused, send)
            return
        except TimeoutError:
            message = f"the body did not arrive within {self.timeout_s:g} s (body_timeout_s)"
            await self.refuse(Refused(408, message, "body_timeout"), send)
            return
        if body is not None:
            await self.app(scope, replayed(body, receive), send)

    async def read(self, headers: Headers, receive: Receive) -> bytes | None:
        """Return the body; None if the client has gone. Raises RefusalError."""
        declared = headers.get("content-length", "0")
        # "²" is a digit to Python, and thousands of digits are no number to it.
        self.check(int(declared[:MAX_DIGITS]) if declared.isascii() and declared.isdigit() else 0)
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            self.check(len(body))
            if not message.get("more_body", False):
                return bytes(body)

    def check(self, num_bytes: int) -> None:
        """Raise RefusalError for too many."""
        if num_bytes > self.max_bytes:
            message = f"a body of {num_bytes:,} bytes; at most {self.max_bytes:,} (max_body_bytes)"
            raise RefusalError(Refused(413, message, "body_too_large"))

    async def refuse(self, refused: Refused, send: Send) -> None:
        """Count and answer."""
        self.on_refused(refused)
        await send_refused(refused, send)


def counted(receive: Receive, max_bytes: int) -> Receive:
    """Pass a body on until it has become too long; then its client has gone, as far as the app can tell."""
    left = max_bytes

    async def receive_less() -> Message:
        nonlocal left
        message = await receive()
        left -= len(message.get("body", b""))
        return message if left >= 0 else {"type": "http.disconnect"}

    return receive_less


def replayed(body: bytes, receive: Receive) -> Receive:
    """Give the body once, then whatever else comes: a client that leaves."""
    pending: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive_again() -> Message:
        return pending.pop() if pending else await receive()

    return receive_again
