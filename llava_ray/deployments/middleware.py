"""What stands in front of every route: who asks, how much is sent, how long it takes; refused as early as can be."""

import asyncio
import ipaddress
import json
from collections.abc import Callable, Sequence

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llava_ray.deployments.auth import ApiKey, Guard
from llava_ray.deployments.limits import HeldAmounts, client_address
from llava_ray.deployments.refusal import RefusalError, Refused

# Where a key is asked for. The rest is health, or the page, whose own login asks for it.
GUARDED = ("/v1/", "/metrics", "/version")
COUNTED = "/v1/"

# Answered whatever else is open: who asks these decides whether this process lives on.
UNCOUNTED = ("/health", "/ready")

MAX_DIGITS = 20  # of a declared length that are looked at

OnRefused = Callable[[Refused], None]


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


class OpenRequestsMiddleware:
    """Finds out who asks, and refuses what is too much at once from one address or from all.

    ``scope["client"]`` is, for everything behind, the address that is believed.
    """

    def __init__(
        self, app: ASGIApp, open_requests: HeldAmounts, trusted_proxies: Sequence[str], on_refused: OnRefused
    ) -> None:
        """Count in ``open_requests``; ``trusted_proxies`` are addresses and networks."""
        self.app = app
        self.open_requests = open_requests
        self.trusted = tuple(ipaddress.ip_network(entry, strict=False) for entry in trusted_proxies)
        self.on_refused = on_refused

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let the request through, or answer 429. Nothing here speaks WebSocket: such a connection is closed."""
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        address = client_address(scope, self.trusted)
        scope["client"] = (address, 0)
        if route_path(scope) in UNCOUNTED:
            await self.app(scope, receive, send)
        elif not self.open_requests.take(address):
            limits = self.open_requests
            message = (
                f"too many requests are open: at most {limits.per_holder:,} from one address "
                f"(max_open_requests_per_address) and {limits.total:,} in all (max_open_requests); end some first"
            )
            refused = Refused(429, message, "too_many_open_requests", retry_after_s=1)
            self.on_refused(refused)
            await send_refused(refused, send)
        else:
            try:
                await self.app(scope, receive, send)
            finally:
                self.open_requests.release(address)


class AuthMiddleware:
    """Asks for a key before a byte of the body is read; ``scope["api_key"]`` is who came in."""

    def __init__(self, app: ASGIApp, guard: Guard, on_refused: OnRefused) -> None:
        """Guard ``app``."""
        self.app = app
        self.guard = guard
        self.on_refused = on_refused

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let the request through, or answer 401 or 429. A browser's preflights are answered before they come here."""
        if scope["type"] != "http" or not route_path(scope).startswith(GUARDED):
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
    """Reads the body of a POST to the API whole, within a size, a time and the bytes of all, before the route runs.

    No other method has a body here: what is sent with one is never read. The page reads its own (``page_guard``).
    """

    def __init__(
        self,
        app: ASGIApp,
        max_bytes: int,
        timeout_s: float,
        bytes_in_flight: HeldAmounts,
        on_refused: OnRefused,
    ) -> None:
        """Keep the limits."""
        self.app = app
        self.max_bytes = max_bytes
        self.timeout_s = timeout_s
        self.bytes_in_flight = bytes_in_flight
        self.on_refused = on_refused

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let the request through with its body, or answer 413 (from the header alone, if it says so), 408 or 429."""
        if scope["type"] != "http" or not route_path(scope).startswith(GUARDED):
            await self.app(scope, receive, send)
            return
        if scope["method"] != "POST":
            await self.app(scope, replayed(b"", receive), send)
            return
        reading = BodyReading(self.max_bytes, "max_body_bytes", self.bytes_in_flight, holder_of(scope))
        try:
            body = await reading.read(Headers(scope=scope), receive, self.timeout_s)
            if body is not None:
                await self.app(scope, replayed(body, receive), send)
        except RefusedBodyError as error:
            self.on_refused(error.refused)
            await send_refused(error.refused, send)
        finally:
            reading.release()


class RefusedBodyError(RefusalError):
    """A body that is refused before any route has seen it."""


class BodyReading:
    """Reads one body, and holds its bytes against the limits of all until it is released."""

    def __init__(self, max_bytes: int, setting: str, bytes_in_flight: HeldAmounts, holder: str) -> None:
        """Read at most ``max_bytes``, which ``setting`` says; ``holder`` is a key's name or an address."""
        self.max_bytes = max_bytes
        self.setting = setting
        self.bytes_in_flight = bytes_in_flight
        self.holder = holder
        self.held = 0

    async def read(self, headers: Headers, receive: Receive, timeout_s: float) -> bytes | None:
        """Return the body; None if the client has gone. Raises RefusedBodyError."""
        try:
            async with asyncio.timeout(timeout_s):
                return await self.read_chunks(headers, receive)
        except TimeoutError:
            message = f"the body did not arrive within {timeout_s:g} s (body_timeout_s)"
            raise RefusedBodyError(Refused(408, message, "body_timeout")) from None

    async def read_chunks(self, headers: Headers, receive: Receive) -> bytes | None:
        """Read until the end or the first byte too many."""
        declared = headers.get("content-length", "0")
        # "²" is a digit to Python, and thousands of digits are no number to it.
        self.hold(int(declared[:MAX_DIGITS]) if declared.isascii() and declared.isdigit() else 0)
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


def too_many_bytes_in_flight(limits: HeldAmounts) -> Refused:
    """Return the refusal of a request whose bytes are too many together with those of others."""
    message = (
        f"the requests that are being answered hold too many bytes: at most {limits.per_holder:,} with one key or from "
        f"one address (max_bytes_in_flight_per_key) and {limits.total:,} in all (max_bytes_in_flight); try again"
    )
    return Refused(429, message, "too_many_bytes_in_flight", retry_after_s=2)


def holder_of(scope: Scope) -> str:
    """Return who holds a request's bytes: its key's name, or where it comes from."""
    key: ApiKey | None = scope.get("api_key")
    return f"key {key.name}" if key is not None and key.sha256 else f"address {scope['client'][0]}"


def counted(receive: Receive, max_bytes: int, timeout_s: float) -> Receive:
    """Pass a body on until it is too long or too slow; then its client has gone, as far as the app can tell."""
    left = max_bytes
    deadline: float | None = asyncio.get_running_loop().time() + timeout_s  # None once the body is whole

    async def receive_less() -> Message:
        nonlocal left, deadline
        try:
            async with asyncio.timeout_at(deadline):
                message = await receive()
        except TimeoutError:
            return {"type": "http.disconnect"}
        left -= len(message.get("body", b""))
        if not message.get("more_body", False):
            deadline = None
        return message if left >= 0 else {"type": "http.disconnect"}

    return receive_less


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
