"""The page's routes: an allow-list of Gradio's routes, behind the login, each with its limits."""

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
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llava_ray.deployments.chat_page.events import SESSION_CHARS, PageEvents
from llava_ray.deployments.chat_page.sessions import SessionOwners, UnreadEvents
from llava_ray.deployments.http.auth import ANYBODY, ApiKey
from llava_ray.deployments.http.bodies import BodyReading, forward_body, replay_body
from llava_ray.deployments.http.limits import AddressRates, holder_of
from llava_ray.deployments.http.middleware import UNCOUNTED, guarded_paths, route_path, send_refused
from llava_ray.deployments.http.routes import Front
from llava_ray.deployments.refusal import RefusalError, Refused, refuse

_SMALL_BODY = 16 * 1024
_EVENT_BYTES = 1 << 20  # a chat without its images; Gradio keeps the last one of each session
_UPLOAD_TIMEOUT_S = 120.0

_Kind = Literal["plain", "login", "small", "event", "cancel", "upload", "file", "stream"]


@dataclass(frozen=True)
class PageRoute:
    """One of Gradio's routes that the page uses."""

    methods: tuple[str, ...]
    path: str
    """A regular expression for the whole path."""
    kind: _Kind = "plain"
    public: bool = False
    """Whether the login page itself loads it."""


GET = ("GET", "HEAD")
_FILE = "/gradio_api/file="
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
    PageRoute(GET, f"{_FILE}.+", "file"),
    PageRoute(("POST",), "/gradio_api/cancel", "cancel"),
    PageRoute(("POST",), "/gradio_api/reset/?", "small"),
)
_NO_SUCH_PAGE = Refused(404, "no such page here", "unknown_path")
_NOT_AN_UPLOAD = Refused(400, "not an upload as a browser sends it; attach the images again", "page_upload")
_NOT_LOGGED_IN = Refused(401, "log in first, with the name of an API key and the key", "not_logged_in")


def _query_of(scope: Scope) -> dict[str, list[str]]:
    """Return the parsed query of an address."""
    return parse_qs(scope.get("query_string", b"").decode("latin-1"), keep_blank_values=True)


def _find_route(scope: Scope) -> PageRoute:
    """Return the route of a request. Raises RefusalError (404) if the page has none."""
    path = route_path(scope) or "/"
    for route in ROUTES:
        if scope["method"] in route.methods and re.fullmatch(route.path, path, re.DOTALL):
            if "deep_link" in _query_of(scope):
                break  # Gradio would load a state from a file of that name
            return route
    raise RefusalError(_NO_SUCH_PAGE)


class PageMiddleware:
    """Middleware in front of Gradio: requests outside the table of routes do not reach it."""

    def __init__(
        self,
        app: ASGIApp,
        front: Front,
        find_user: Callable[[Mapping[str, str]], str | None],
        drop_session: Callable[[str], None],
        events: PageEvents,
    ) -> None:
        """Initialise; ``find_user`` returns the user of cookies, ``drop_session`` ends a session's events."""
        self.app = app
        self.front = front
        self.settings = front.settings
        self.paths_of_api = guarded_paths(api_docs=front.settings.api_docs)
        self.find_user = find_user
        self.events = events
        self.unread = UnreadEvents(front.bytes_in_flight, drop_session)
        self.owners = SessionOwners()
        self.logins = AddressRates(front.settings.logins_per_minute, time.monotonic)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Forward a request of the page, or respond 4xx."""
        if scope["type"] != "http" or route_path(scope).startswith(self.paths_of_api) or route_path(scope) in UNCOUNTED:
            await self.app(scope, receive, send)
            return
        try:
            route = _find_route(scope)
            scope["api_key"] = self.identify(scope, route)
            await self.pass_on(route, scope, receive, send)
        except RefusalError as error:
            self.front.count_refused(error.refused)
            await send_refused(error.refused, send)

    def identify(self, scope: Scope, route: PageRoute) -> ApiKey:
        """Return the user of the session. Raises RefusalError (401) where a login is needed."""
        if not self.front.guard.keys:
            return ANYBODY
        user = self.find_user(cookie_parser(Headers(scope=scope).get("cookie", "")))
        api_key = next((key for key in self.front.guard.keys if key.name == user), None)
        if api_key is None and not route.public:
            raise RefusalError(_NOT_LOGGED_IN)
        return api_key or ANYBODY

    async def pass_on(self, route: PageRoute, scope: Scope, receive: Receive, send: Send) -> None:
        """Check a request by the kind of its route, and forward it. Raises RefusalError."""
        match route.kind:
            case "plain":
                await self.app(scope, replay_body(b"", receive), send)
            case "file":
                self.check_file(scope)
                # Without ranges: files are small, and Gradio fails on all but the simplest range.
                scope["headers"] = [pair for pair in scope["headers"] if pair[0] != b"range"]
                await self.app(scope, replay_body(b"", receive), send)
            case "stream":
                await self.pass_stream(scope, receive, send)
            case "upload":
                await self.pass_upload(scope, receive, send)
            case _:
                await self.pass_body(route.kind, scope, receive, send)

    def admit(self, refused: Refused | None) -> None:
        """Raise the given refusal, if any, as RefusalError."""
        if refused is not None:
            raise RefusalError(refused)

    def check_file(self, scope: Scope) -> None:
        """Check that a file lies in the upload folder; URLs would be fetched. Raises RefusalError."""
        try:
            self.events.uploads.resolve(route_path(scope).removeprefix(_FILE))
        except RefusalError:
            raise RefusalError(_NO_SUCH_PAGE) from None

    async def check_room(self, num_bytes: int) -> None:
        """Check that the upload folder has room for so many bytes. Raises RefusalError (507)."""
        limit = self.settings.max_upload_bytes
        await asyncio.to_thread(self.events.uploads.delete_partial)
        if await asyncio.to_thread(self.events.uploads.total_bytes) + num_bytes > limit:
            message = f"the page keeps at most {limit:,} bytes of uploads (max_upload_bytes); they go after a day"
            raise refuse(507, message, "uploads_full")

    def check_query(self, scope: Scope) -> None:
        """Check the length of a query's values, which Gradio keeps in memory. Raises RefusalError."""
        if any(len(value) > SESSION_CHARS for values in _query_of(scope).values() for value in values):
            raise refuse(400, "not a session of this page; load it again", "page_event")

    async def pass_upload(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Forward an upload while its bytes are counted; reject it if Gradio fails. Raises RefusalError."""
        self.check_query(scope)
        self.admit(self.front.guard.admit(scope["api_key"]))
        held, settings = self.front.bytes_in_flight, self.settings
        limit = min(settings.max_images * settings.max_image_bytes + settings.max_body_bytes, held.per_holder)
        await self.check_room(limit)
        reading, failed = BodyReading(limit, "of one upload to the page", held, holder_of(scope)), False

        async def send_if_read(message: Message) -> None:
            nonlocal failed
            failed = failed or reading.refused is not None or message.get("status", 200) >= 500
            if not failed:
                await send(message)

        try:
            body = forward_body(reading, Headers(scope=scope), receive, _UPLOAD_TIMEOUT_S)
            await self.app(scope, body, send_if_read)
        except RefusalError:
            raise
        except Exception:
            if not failed:  # after a refusal, whatever the broken-off upload raises in Gradio is expected
                raise
        finally:
            reading.release()
        if failed:
            raise RefusalError(reading.refused or _NOT_AN_UPLOAD)

    async def pass_stream(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Forward a stream within the limits. Raises RefusalError: 429, or 404 for another user's session."""
        self.check_query(scope)
        place, _, name = route_path(scope).rpartition("/")
        session = _query_of(scope).get("session_hash", [""])[-1] if name == "data" else ""
        self.owners.claim(name if place.endswith("/heartbeat") else session, scope["api_key"])
        streams = self.front.page_streams
        message = (
            f"too many pages are open: at most {streams.per_holder:,} streams from one address "
            f"(max_page_streams_per_address) and {streams.total:,} in all (max_page_streams); close some"
        )
        refused = Refused(429, message, "too_many_page_streams", retry_after_s=5)
        with streams.hold(scope["client"][0], 1, refused), self.unread.reading(session):
            await self.app(scope, replay_body(b"", receive), send)

    def checked_event(self, scope: Scope, body: bytes) -> bytes:
        """Return a validated event, serialised again, and count its bytes. Raises RefusalError."""
        event = self.events.read(body)
        self.owners.claim(event["session_hash"], scope["api_key"])
        encoded = json.dumps(event).encode()
        self.unread.add(event["session_hash"], holder_of(scope), len(encoded))
        return encoded

    def checked_cancel(self, scope: Scope, body: bytes) -> bytes:
        """Return a validated cancellation of the user's own event. Raises RefusalError."""
        cancel = self.events.read_cancel(body)
        self.owners.claim(cancel["session_hash"], scope["api_key"])
        return json.dumps(cancel).encode()

    async def pass_body(self, kind: _Kind, scope: Scope, receive: Receive, send: Send) -> None:
        """Read a whole body and forward it; events as validated. Raises RefusalError."""
        if kind == "login":
            self.admit(self.logins.admit(scope["client"][0], "logins"))
        checked = {"event": self.checked_event, "cancel": self.checked_cancel}.get(kind)
        max_bytes = _EVENT_BYTES if kind == "event" else _SMALL_BODY
        reading = BodyReading(max_bytes, "of the page", self.front.bytes_in_flight, holder_of(scope))
        try:
            body = await reading.read(Headers(scope=scope), receive, self.settings.body_timeout_s)
            if body is None:
                return
            if checked is not None:
                body = checked(scope, body)
                scope["headers"] = _with_json_headers(scope["headers"], len(body))
            await self.app(scope, replay_body(body, receive), send)
        finally:
            reading.release()


def _with_json_headers(headers: list[tuple[bytes, bytes]], num_bytes: int) -> list[tuple[bytes, bytes]]:
    """Return a request's headers for a JSON body that replaces the original one."""
    others = [pair for pair in headers if pair[0] not in (b"content-length", b"content-type", b"transfer-encoding")]
    return [*others, (b"content-type", b"application/json"), (b"content-length", str(num_bytes).encode())]
