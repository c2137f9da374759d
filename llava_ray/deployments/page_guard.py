"""The page's routes: the few of Gradio's that the page uses, behind its login, each within its bounds; no others."""

import asyncio
import json
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal
from urllib.parse import parse_qs

from starlette.datastructures import Headers
from starlette.requests import cookie_parser
from starlette.types import ASGIApp, Receive, Scope, Send

from llava_ray.deployments.auth import ANYBODY, ApiKey
from llava_ray.deployments.bodies import BodyReading, counted, replayed
from llava_ray.deployments.limits import AddressRates, holder_of
from llava_ray.deployments.middleware import GUARDED, UNCOUNTED, route_path, send_refused
from llava_ray.deployments.page_events import PageEvents
from llava_ray.deployments.page_sessions import UnreadEvents
from llava_ray.deployments.refusal import RefusalError, Refused, refuse
from llava_ray.deployments.routes import Front

SMALL_BODY = 16 * 1024
EVENT_BYTES = 1 << 20  # a chat without its images; Gradio keeps the last one of each session
UPLOAD_TIMEOUT_S = 120.0

Kind = Literal["plain", "login", "small", "event", "upload", "file", "stream"]


@dataclass(frozen=True)
class PageRoute:
    """One of Gradio's routes that the page uses."""

    methods: tuple[str, ...]
    path: str
    """A regular expression for the whole path."""
    kind: Kind = "plain"
    public: bool = False
    """Whether the login page itself loads it."""


GET = ("GET", "HEAD")
FILE = "/gradio_api/file="
ROUTES = (
    PageRoute(GET, "/", public=True),
    PageRoute(GET, "/(assets|static)/.+", public=True),
    PageRoute(GET, "/(favicon.ico|manifest.json|theme.css|robots.txt)", public=True),
    PageRoute(("POST",), "/login/?", "login", public=True),
    PageRoute(GET, "/(config|logout)/?"),
    PageRoute(GET, "/gradio_api/(app_id|login_check)/?"),
    PageRoute(("POST",), "/gradio_api/queue/join", "event"),
    PageRoute(("GET",), "/gradio_api/queue/data", "stream"),
    PageRoute(("GET",), "/gradio_api/heartbeat/[^/]{1,64}", "stream"),
    PageRoute(("GET",), "/gradio_api/upload_progress", "stream"),
    PageRoute(("POST",), "/gradio_api/upload", "upload"),
    PageRoute(GET, f"{FILE}.+", "file"),
    PageRoute(("POST",), "/gradio_api/(cancel|reset)/?", "small"),
)
NO_SUCH_PAGE = Refused(404, "no such page here", "unknown_path")
NOT_LOGGED_IN = Refused(401, "log in first, with the name of an API key and the key", "not_logged_in")


def find_route(scope: Scope) -> PageRoute:
    """Return the route of a request. Raises RefusalError (404) if the page has none."""
    path = route_path(scope) or "/"
    for route in ROUTES:
        if scope["method"] in route.methods and re.fullmatch(route.path, path, re.DOTALL):
            if b"deep_link" in scope.get("query_string", b""):
                break  # Gradio would read a state from a file of that name
            return route
    raise RefusalError(NO_SUCH_PAGE)


class PageMiddleware:
    """Stands in front of Gradio: what is not in the table of routes does not reach it."""

    def __init__(
        self,
        app: ASGIApp,
        front: Front,
        find_user: Callable[[Mapping[str, str]], str | None],
        drop_session: Callable[[str], None],
        events: PageEvents,
    ) -> None:
        """``find_user`` returns who is logged in by these cookies; ``drop_session`` ends what a session has begun."""
        self.app = app
        self.front = front
        self.settings = front.settings
        self.find_user = find_user
        self.events = events
        self.unread = UnreadEvents(front.bytes_in_flight, drop_session)
        self.logins = AddressRates(front.settings.logins_per_minute, time.monotonic)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request of the page through, or answer 4xx."""
        if scope["type"] != "http" or route_path(scope).startswith(GUARDED) or route_path(scope) in UNCOUNTED:
            await self.app(scope, receive, send)
            return
        try:
            route = find_route(scope)
            scope["api_key"] = self.identify(scope, route)
            await self.pass_on(route, scope, receive, send)
        except RefusalError as error:
            self.front.count_refused(error.refused)
            await send_refused(error.refused, send)

    def identify(self, scope: Scope, route: PageRoute) -> ApiKey:
        """Return whose session asks. Raises RefusalError (401) where one is needed."""
        if not self.front.guard.keys:
            return ANYBODY
        user = self.find_user(cookie_parser(Headers(scope=scope).get("cookie", "")))
        who = next((key for key in self.front.guard.keys if key.name == user), None)
        if who is None and not route.public:
            raise RefusalError(NOT_LOGGED_IN)
        return who or ANYBODY

    async def pass_on(self, route: PageRoute, scope: Scope, receive: Receive, send: Send) -> None:
        """Check what a route of this kind is sent, and let it through. Raises RefusalError."""
        address = scope["client"][0]
        match route.kind:
            case "plain":
                await self.app(scope, replayed(b"", receive), send)
            case "file":
                self.check_file(scope)
                await self.app(scope, replayed(b"", receive), send)
            case "stream":
                await self.pass_stream(address, scope, receive, send)
            case "upload":
                self.admit(self.front.guard.admit(scope["api_key"]))
                limit = self.settings.max_images * self.settings.max_image_bytes + self.settings.max_body_bytes
                await self.check_room(limit)
                await self.app(scope, counted(receive, limit, UPLOAD_TIMEOUT_S), send)
            case "login":
                self.admit(self.logins.admit(address, "logins"))
                await self.pass_body(SMALL_BODY, scope, receive, send)
            case "small":
                await self.pass_body(SMALL_BODY, scope, receive, send)
            case "event":
                await self.pass_body(EVENT_BYTES, scope, receive, send, as_event=True)

    def admit(self, refused: Refused | None) -> None:
        """Raise RefusalError if there is a refusal."""
        if refused is not None:
            raise RefusalError(refused)

    def check_file(self, scope: Scope) -> None:
        """Raise RefusalError unless a file's address leads into the upload folder; URLs would be fetched."""
        try:
            self.events.uploads.resolve(route_path(scope).removeprefix(FILE))
        except RefusalError:
            raise RefusalError(NO_SUCH_PAGE) from None

    async def check_room(self, num_bytes: int) -> None:
        """Raise RefusalError (507) if the upload folder could become larger than it may."""
        limit = self.settings.max_upload_bytes
        if await asyncio.to_thread(self.events.uploads.total_bytes) + num_bytes > limit:
            message = f"the page keeps at most {limit:,} bytes of uploads (max_upload_bytes); they go after a day"
            raise refuse(507, message, "uploads_full")

    async def pass_stream(self, address: str, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a stream through while it has a place. Raises RefusalError (429)."""
        query = parse_qs(scope.get("query_string", b"").decode("latin-1"))
        if any(len(value) > 64 for values in query.values() for value in values):
            raise refuse(400, "not a session of this page; load it again", "page_event")
        streams = self.front.page_streams
        message = (
            f"too many pages are open: at most {streams.per_holder:,} streams from one address "
            f"(max_page_streams_per_address) and {streams.total:,} in all (max_page_streams); close some"
        )
        session = query.get("session_hash", [""])[0] if route_path(scope).endswith("/queue/data") else ""
        refused = Refused(429, message, "too_many_page_streams", retry_after_s=5)
        with streams.hold(address, 1, refused), self.unread.reading(session):
            await self.app(scope, replayed(b"", receive), send)

    async def pass_body(
        self, max_bytes: int, scope: Scope, receive: Receive, send: Send, *, as_event: bool = False
    ) -> None:
        """Read a body whole, and let it through as it was; an event only as it was understood. Raises RefusalError."""
        reading = BodyReading(max_bytes, "of the page", self.front.bytes_in_flight, holder_of(scope))
        try:
            body = await reading.read(Headers(scope=scope), receive, self.settings.body_timeout_s)
            if body is None:
                return
            if as_event:
                event = self.events.read(body)
                body = json.dumps(event).encode()
                self.unread.add(event["session_hash"], holder_of(scope), len(body))
                scope["headers"] = with_json_headers(scope["headers"], len(body))
            await self.app(scope, replayed(body, receive), send)
        finally:
            reading.release()


def with_json_headers(headers: list[tuple[bytes, bytes]], num_bytes: int) -> list[tuple[bytes, bytes]]:
    """Return a request's headers for a JSON body in place of the one that came."""
    kept = [pair for pair in headers if pair[0] not in (b"content-length", b"content-type", b"transfer-encoding")]
    return [*kept, (b"content-type", b"application/json"), (b"content-length", str(num_bytes).encode())]
