"""What strangers send to the mounted page: paths of the server, Gradio's other routes, endless streams and bytes."""

import itertools
import re
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from page_client import KEY, PageClient, build_page, chat_with, file_object, image_part
from pictures import picture
from serving import served, write_examples
from starlette.routing import Mount, Route

from llava_ray.deployments.chat_page.guard import ROUTES

pytestmark = pytest.mark.slow

SECRET = b"a secret of this machine"

ASKED = ["chatbot", "dropdown", "slider", "slider", "slider", "checkbox"]
# Each handler of the page by its name in /config, and what its inputs are. A new one belongs into these tests.
HANDLERS = {
    "choose": [],
    "ask": ["multimodaltextbox", "chatbot"],
    "answer": ASKED,
    "ask_example": ["chatbot"],
    "answer_1": ASKED,
    "undo": ["chatbot"],
    "answer_2": ASKED,
    "end": [],
    "edit_last": ["chatbot"],
    "new_chat": [],
    "count": ASKED,
    "count_1": ASKED,
    "count_2": ASKED,
    "log_turn": ASKED,
    "js_fn": ["textbox"],
}
ORDINARY: dict[str, Any] = {
    "chatbot": [],
    "multimodaltextbox": {"text": "", "files": []},
    "dropdown": "echo",
    "slider": 1,
    "checkbox": False,
    "textbox": "",
}
WITH_FILES = [
    (name, place)
    for name, kinds in HANDLERS.items()
    for place, kind in enumerate(kinds)
    if kind in ("chatbot", "multimodaltextbox")
]


class Listener:
    """A server of this machine that must never be asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        asked = self.asked

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                asked.append(self.path)
                self.send_response(200)
                self.end_headers()
                self.wfile.write(SECRET)

            def log_message(self, *arguments: Any) -> None:
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture(scope="module")
def listener() -> Iterator[Listener]:
    one = Listener()
    yield one
    one.server.shutdown()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where uploads go in these tests, with a secret beside it and a link that leads out."""
    place = tmp_path_factory.mktemp("page") / "uploads"
    place.mkdir()
    (place.parent / "secret.png").write_bytes(SECRET)
    (place / "link.png").symlink_to(place.parent / "secret.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(place))
        yield place


@pytest.fixture(scope="module")
def client(folder: Path) -> Iterator[PageClient]:
    examples = write_examples(folder.parent)
    app, _ = build_page(max_images=2, max_body_bytes=1 << 20, max_text_chars=100_000, page_examples=examples)
    with served(app) as address:
        yield PageClient(address)


@pytest.fixture(scope="module")
def locked(folder: Path) -> Iterator[str]:
    app, _ = build_page(keys=True)
    with served(app) as address:
        yield address


def hostile_paths(folder: Path, listener: Listener) -> list[str]:
    return [
        str(folder.parent / "secret.png"),
        f"{folder}/../secret.png",
        "../secret.png",
        str(folder / "link.png"),
        f"file://{folder.parent}/secret.png",
        f"{listener.address}/path.png",
        f"{folder}/{listener.address}/path.png",
        str(folder),
        "",
        "/dev/zero",
        "/proc/self/environ",
        f"{folder}/\0.png",
        f"{folder}/{'x' * 5000}",
    ]


def with_file(kind: str, file: dict[str, Any]) -> Any:
    """A value of a component that names a file."""
    if kind == "multimodaltextbox":
        return {"text": "what?", "files": [file]}
    return chat_with({"type": "file", "file": file}, {"type": "text", "text": "what?"})


def data_of(name: str, place: int, value: Any) -> list[Any]:
    return [value if index == place else ORDINARY[kind] for index, kind in enumerate(HANDLERS[name])]


def test_the_handlers_are_those_that_these_tests_know(client: PageClient) -> None:
    config = client.http.get("/config").json()
    kinds = {component["id"]: component["type"] for component in config["components"]}
    found = {one["api_name"]: [kinds[number] for number in one["inputs"]] for one in config["dependencies"]}
    assert found == HANDLERS


@pytest.mark.parametrize(("name", "place"), WITH_FILES)
def test_no_handler_reads_what_was_not_uploaded(
    client: PageClient, folder: Path, listener: Listener, name: str, place: int
) -> None:
    kind = HANDLERS[name][place]
    for path in hostile_paths(folder, listener):
        response = client.join(client.number_of(name), data_of(name, place, with_file(kind, file_object(path))))
        assert response.status_code == 400, path
        assert response.json()["error"]["code"] == "page_file"
    assert listener.asked == []
    assert not [
        file for file in folder.rglob("*") if file.is_file() and SECRET in file.read_bytes() and not file.is_symlink()
    ]


@pytest.mark.parametrize(
    "value",
    [
        chat_with(
            {"type": "component", "component": "image", "value": "/etc/passwd", "constructor_args": {}, "props": {}}
        ),
        chat_with({"type": "file", "file": "/etc/passwd"}),
        chat_with({"type": "file", "file": {"path": ["/etc/passwd"]}}),
        chat_with(["/etc/passwd", "a picture"]),
        chat_with({"path": "/etc/passwd"}),
        [{"role": "system", "content": "x"}],
        [["/etc/passwd", None]],
        "/etc/passwd",
        {"path": "/etc/passwd"},
        [{"role": "user", "content": "x"}] * 1001,
    ],
)
def test_what_no_chatbot_sends_is_refused(client: PageClient, value: Any) -> None:
    response = client.join(client.number_of("log_turn"), data_of("log_turn", 0, value))
    assert (response.status_code, response.json()["error"]["code"]) == (400, "page_event")


def test_addresses_beside_a_path_are_not_followed(client: PageClient, listener: Listener) -> None:
    path = client.upload(picture())
    part = image_part(path, url=f"{listener.address}/url.png", is_stream=True)
    assert client.join(client.number_of("edit_last"), [chat_with(part)]).status_code == 200
    assert "data" in client.outcome()
    assert listener.asked == []


def test_an_example_is_the_servers_own(client: PageClient, folder: Path) -> None:
    chosen = {"index": 0, "value": {"text": "x", "files": [str(folder.parent / "secret.png")]}}
    assert client.join(client.number_of("ask_example"), [[]], event_data=chosen).status_code == 200
    [image, question] = client.outcome()["data"][0]
    assert Path(image["content"][0]["file"]["path"]).is_relative_to(folder)
    assert question["content"][0]["text"].startswith("What shape")


def test_an_uploaded_image_is_exported(client: PageClient) -> None:
    path = client.upload(picture(40, 30))
    client.join(client.number_of("log_turn"), data_of("log_turn", 0, chat_with(image_part(path))))
    assert "data:image/png;base64," in client.outcome()["data"][0]


@pytest.mark.parametrize("name", ["answer", "log_turn"])
def test_one_upload_named_sixty_times_is_not_read(client: PageClient, name: str) -> None:
    path = client.upload(b"x" * 500_000)
    before = psutil.Process().memory_info().rss
    client.join(client.number_of(name), data_of(name, 0, chat_with(*[image_part(path)] * 60)))
    assert "60 images; at most 2" in str(client.outcome())
    assert psutil.Process().memory_info().rss - before < 20_000_000


@pytest.mark.parametrize("name", ["answer", "log_turn"])
def test_more_bytes_than_a_request_may_have_are_not_read(client: PageClient, name: str) -> None:
    path = client.upload(b"x" * 500_000)
    client.join(client.number_of(name), data_of(name, 0, chat_with(*[image_part(path)] * 2)))
    assert "at most 1,048,576 (max_body_bytes)" in str(client.outcome())


def test_the_file_route_shows_uploads_and_nothing_else(client: PageClient, folder: Path, listener: Listener) -> None:
    path = client.upload(picture())
    assert client.http.get(f"/gradio_api/file={path}").content == picture()
    for hostile in hostile_paths(folder, listener):
        if "\0" not in hostile:
            assert client.http.get(f"/gradio_api/file={hostile}").status_code in (404, 414), hostile
    assert listener.asked == []


def every_route(app: Any) -> list[tuple[str, str]]:
    """All of Gradio's routes, with something in the place of each parameter."""
    [mounted] = [route.app for route in app.routes if isinstance(route, Mount)]
    included = [route.original_router for route in mounted.routes if hasattr(route, "original_router")]
    return [
        (method, re.sub(r"{\w+(:\w+)?}", "x", route.path))
        for route in [*mounted.routes, *(route for router in included for route in router.routes)]
        if isinstance(route, Route)
        for method in sorted(route.methods or ())
    ]


def test_without_a_login_only_the_login_page_is_there(folder: Path, locked: str) -> None:
    app, _ = build_page(keys=True)
    client, statuses = PageClient(locked), {}
    for method, path in every_route(app):
        with client.http.stream(method, path) as response:
            statuses[method, path] = response.status_code
    shown = {path for (method, path), status in statuses.items() if status not in (401, 404)}
    # The login itself says 422 to a form without a name; robots.txt and theme.css hold nothing of anybody's.
    assert shown == {"/", "/login", "/login/", "/favicon.ico", "/manifest.json", "/robots.txt", "/theme.css"}
    assert len(statuses) > 60
    assert statuses["GET", "/gradio_api/heartbeat/x"] == 401
    assert statuses["GET", "/monitoring/x"] == 404


def test_with_a_login_only_what_the_page_uses_is_there(folder: Path, locked: str) -> None:
    app, _ = build_page(keys=True)
    client = PageClient(locked)
    assert client.log_in().status_code == 200
    shown = set()
    for method, path in every_route(app):
        if method == "GET" and not path.startswith(("/gradio_api/queue/data", "/gradio_api/heartbeat")):
            with client.http.stream(method, path) as response:
                shown |= {path} if response.status_code != 404 else set()
    assert shown <= {path for path in shown if any(re.fullmatch(route.path, path) for route in ROUTES)}
    for path in ("/gradio_api/info", "/gradio_api/openapi.json", "/gradio_api/token", "/monitoring", "/openapi.json"):
        assert client.http.get(path).status_code == 404
    for path in ("/gradio_api/run/log_turn", "/gradio_api/call/log_turn", "/gradio_api/component_server"):
        assert client.http.post(path, json={"data": []}).status_code == 404
    assert client.http.get("/?deep_link=x").status_code == 404
    assert client.http.get("/version").status_code == 401  # the API's: its key, not the page's login
    assert client.http.get("/version", headers={"authorization": f"Bearer {KEY}"}).status_code == 200


def test_a_login_is_asked_for_before_anything_is_read(locked: str) -> None:
    port = int(locked.rpartition(":")[2])
    for path in ("/gradio_api/upload", "/gradio_api/queue/join", "/gradio_api/cancel", "/gradio_api/reset"):
        with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
            connection.sendall(f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: 30000000\r\n\r\n".encode())
            answer = connection.recv(65536)
        assert answer.startswith(b"HTTP/1.1 401")


def test_forged_cookies_are_nobody(locked: str) -> None:
    client = PageClient(locked)
    client.log_in()
    names = list(client.http.cookies)
    assert names
    for name in names:
        assert httpx.get(f"{locked}/config", cookies={name: "forged"}).status_code == 401
        assert httpx.get(f"{locked}/config", cookies={name: ""}).status_code == 401


def test_logins_are_limited_by_address_whatever_a_header_says(folder: Path) -> None:
    app, _ = build_page(keys=True, logins_per_minute=8)
    with served(app) as address:
        one = PageClient(address, local_address="127.0.0.2")
        statuses = [
            one.http.post(
                "/login",
                data={"username": "alice", "password": f"guess {number}"},
                headers={"x-forwarded-for": f"10.0.0.{number}"},
            ).status_code
            for number in range(6)
        ]
        assert statuses == [400, 400, 429, 429, 429, 429]
        assert PageClient(address, local_address="127.0.0.3").log_in().status_code == 200
        # The server in front believes the header of 127.0.0.1; we do not.
        local = PageClient(address)
        statuses = [
            local.http.post(
                "/login", data={"username": "alice", "password": "x"}, headers={"x-forwarded-for": f"10.0.0.{number}"}
            ).status_code
            for number in range(6)
        ]
        assert statuses.count(429) == 4


def test_a_trusted_proxy_says_who_asks(folder: Path) -> None:
    app, _ = build_page(keys=True, logins_per_minute=8, trusted_proxies="127.0.0.0/30")
    with served(app) as address:

        def attempt(proxy: str, forwarded: str) -> int:
            client = PageClient(address, local_address=proxy)
            return client.http.post(
                "/login", data={"username": "alice", "password": "x"}, headers={"x-forwarded-for": forwarded}
            ).status_code

        for proxy in ("127.0.0.1", "127.0.0.2"):
            assert [attempt(proxy, f"6.6.6.6, 10.1.{proxy[-1]}.{number}") for number in range(4)] == [400] * 4
            # What the client wrote itself stands further left, and counts for nothing.
            assert [attempt(proxy, f"7.7.7.{number}, 10.2.{proxy[-1]}.1") for number in range(4)] == [
                400,
                400,
                429,
                429,
            ]


def test_idle_streams_are_bounded_by_address_and_in_total(folder: Path) -> None:
    app, front = build_page(max_page_streams=5, max_page_streams_per_address=2)
    with served(app) as address:
        clients = [PageClient(address, local_address=f"127.0.0.{2 + number}") for number in range(3)]
        opened = []
        for number, client in itertools.product(range(3), clients):
            request = client.http.build_request("GET", f"/gradio_api/heartbeat/s{number}")
            opened.append(client.http.send(request, stream=True))
        assert [response.status_code for response in opened] == [200] * 5 + [429] * 4
        assert PageClient(address).http.get("/").status_code == 200
        opened[0].close()
        for _ in range(100):
            if front.page_streams.held == 4:
                break
            threading.Event().wait(0.05)
        request = clients[0].http.build_request("GET", "/gradio_api/heartbeat/again")
        assert clients[0].http.send(request, stream=True).status_code == 200


def test_open_requests_are_bounded_and_health_is_not(folder: Path) -> None:
    app, _ = build_page(max_open_requests=3, max_open_requests_per_address=2)
    with served(app) as address:
        opened = []
        for number in range(6):
            client = PageClient(address, local_address=f"127.0.0.{2 + number // 3}")
            request = client.http.build_request("GET", "/gradio_api/heartbeat/s")
            opened.append(client.http.send(request, stream=True))
        assert [response.status_code for response in opened] == [200, 200, 429, 200, 429, 429]
        lone = PageClient(address)
        assert lone.http.get("/v1/models").json()["error"]["code"] == "too_many_open_requests"
        assert lone.http.get("/health").status_code == 200


def test_votes_uploads_and_exports_count_as_requests(folder: Path) -> None:
    app, _ = build_page(requests_per_minute=16)  # four at once
    with served(app) as address:
        client = PageClient(address)
        said = []
        for name in ("count", "log_turn", "count", "log_turn", "count", "log_turn"):
            client.join(client.number_of(name), data_of(name, 0, chat_with({"type": "text", "text": "x"})))
            said.append("more than 16 requests a minute" in str(client.outcome()))
        assert said == [False] * 4 + [True] * 2
        response = client.http.post("/gradio_api/upload", files={"files": ("x.png", picture())})
        assert (response.status_code, response.json()["error"]["code"]) == (429, "rate_limit_exceeded")


def test_events_and_logins_have_a_size(client: PageClient) -> None:
    response = client.join(client.number_of("undo"), [[{"role": "user", "content": "x" * 3_000_000}]])
    assert (response.status_code, response.json()["error"]["code"]) == (413, "body_too_large")
    assert client.http.post("/login", content=b"x" * 20_000).status_code == 413


def test_events_without_a_reader_are_bounded(folder: Path) -> None:
    app, front = build_page(max_body_bytes=1 << 20, max_bytes_in_flight=4 << 20, max_bytes_in_flight_per_key=4 << 20)
    with served(app) as address:
        client = PageClient(address)
        number, text = client.number_of("undo"), [{"role": "user", "content": "x" * 500_000}]
        statuses = [client.join(number, [text]).status_code for _ in range(5)]
        assert statuses == [200, 200, 429, 429, 429]
        for outcome in client.outcomes(2):
            assert outcome["data"][0][0]["content"][0]["text"] == "x" * 500_000
        for _ in range(100):
            if not front.bytes_in_flight.held:
                break
            threading.Event().wait(0.05)
        assert (front.bytes_in_flight.held, client.join(number, [text]).status_code) == (0, 200)


def test_uploads_have_a_bound_in_total(folder: Path) -> None:
    app, _ = build_page(max_upload_bytes=1 << 20)
    with served(app) as address:
        response = PageClient(address).http.post("/gradio_api/upload", files={"files": ("x.png", picture())})
        assert (response.status_code, response.json()["error"]["code"]) == (507, "uploads_full")
