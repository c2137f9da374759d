"""Middleware of every route: addresses, keys, sizes and times, checked as early as possible."""

import ipaddress
import json
from collections.abc import Callable, Sequence

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from llava_ray.deployments.http.auth import ApiKey, Guard
from llava_ray.deployments.http.bodies import BodyReading, RefusedBodyError, replay_body
from llava_ray.deployments.http.limits import HeldAmounts, client_address, holder_of
from llava_ray.deployments.refusal import Refused

# Paths that need a key. The rest is health, or the page with its own login.
GUARDED = ("/v1/", "/metrics", "/version", "/tokenize", "/detokenize")
_DESCRIPTION = ("/docs", "/redoc", "/openapi.json")
_COUNTED = ("/v1/", "/tokenize", "/detokenize")

# Answered at any load: health checks decide whether this process is restarted.
UNCOUNTED = ("/health", "/ready")

_OnRefused = Callable[[Refused], None]


def guarded_paths(*, api_docs: bool) -> tuple[str, ...]:
    """Return the beginnings of all paths that need a key; without ``api_docs`` its paths do not exist."""
    return GUARDED + _DESCRIPTION if api_docs else GUARDED


def route_path(scope: Scope) -> str:
    """Return the path for matching routes, without the prefix under which Serve mounts the application."""
    path, prefix = str(scope["path"]), str(scope.get("root_path", ""))
    rest = path.removeprefix(prefix)
    return rest if rest.startswith("/") or not rest else path


async def send_refused(refused: Refused, send: Send) -> None:
    """Send a refusal as the response."""
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
    """Determines the client's address, and limits open requests per address and in total.

    Sets ``scope["client"]`` to the trusted address for all later middleware.
    """

    def __init__(
        self, app: ASGIApp, open_requests: HeldAmounts, trusted_proxies: Sequence[str], on_refused: _OnRefused
    ) -> None:
        """Initialise with the limits and the addresses and networks of trusted proxies."""
        self.app = app
        self.open_requests = open_requests
        self.trusted = tuple(ipaddress.ip_network(entry, strict=False) for entry in trusted_proxies)
        self.on_refused = on_refused

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Forward the request or respond 429; close WebSocket connections, which no route supports."""
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
    """Authenticates before the body is read; sets ``scope["api_key"]``."""

    def __init__(self, app: ASGIApp, guard: Guard, on_refused: _OnRefused, *, api_docs: bool) -> None:
        """Initialise in front of ``app``."""
        self.app = app
        self.paths = guarded_paths(api_docs=api_docs)
        self.guard = guard
        self.on_refused = on_refused

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Forward the request, or respond 401 or 429. CORS preflights are answered before they arrive here."""
        if scope["type"] != "http" or not route_path(scope).startswith(self.paths):
            await self.app(scope, receive, send)
            return
        found = self.check(
            Headers(scope=scope).get("authorization", ""), counted=route_path(scope).startswith(_COUNTED)
        )
        if isinstance(found, Refused):
            self.on_refused(found)
            await send_refused(found, send)
            return
        scope["api_key"] = found
        await self.app(scope, receive, send)

    def check(self, authorization: str, *, counted: bool) -> ApiKey | Refused:
        """Return the key of a request, or a refusal."""
        found = self.guard.identify(authorization)
        if isinstance(found, Refused) or not counted:
            return found
        return self.guard.admit(found) or found


class BodyMiddleware:
    """Reads the whole body of a POST to the API, within the limits, before the route runs.

    Bodies of other methods are never read. The page reads its own (``chat_page.guard``).
    """

    def __init__(
        self,
        app: ASGIApp,
        max_bytes: int,
        timeout_s: float,
        bytes_in_flight: HeldAmounts,
        on_refused: _OnRefused,
    ) -> None:
        """Initialise with the limits."""
        self.app = app
        self.max_bytes = max_bytes
        self.timeout_s = timeout_s
        self.bytes_in_flight = bytes_in_flight
        self.on_refused = on_refused

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Forward the request with its body, or respond 413 (by the header alone if possible), 408 or 429."""
        if scope["type"] != "http" or not route_path(scope).startswith(GUARDED):
            await self.app(scope, receive, send)
            return
        if scope["method"] != "POST":
            await self.app(scope, replay_body(b"", receive), send)
            return
        reading = BodyReading(self.max_bytes, "max_body_bytes", self.bytes_in_flight, holder_of(scope))
        try:
            body = await reading.read(Headers(scope=scope), receive, self.timeout_s)
            if body is not None:
                await self.app(scope, replay_body(body, receive), send)
        except RefusedBodyError as error:
            self.on_refused(error.refused)
            await send_refused(error.refused, send)
        finally:
            reading.release()
