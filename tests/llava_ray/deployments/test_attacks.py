"""What must be refused: each with the right status and an error object, in under a second, contacting nobody."""

import asyncio
import contextlib
import io
import json
import socket
import statistics
import struct
import threading
import time
import zlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI, Response
from fastapi.responses import StreamingResponse
from pictures import picture
from PIL import Image
from serving import EchoEngine, asking, data_uri, served

from llava_ray.deployments.front import build_front
from llava_ray.deployments.gateway import LocalGateway
from llava_ray.deployments.http.auth import ApiKey, digest
from llava_ray.deployments.http.routes import Front
from llava_ray.deployments.media.addresses import Network, is_public
from llava_ray.deployments.replica import Replica
from llava_ray.deployments.settings import ServeSettings

pytestmark = pytest.mark.slow

KEY = "a key of more than sixteen characters"

# The address of this machine that stands for a public one; the media host listens on all of 127.0.0.0/8.
PUBLIC = "127.0.0.2"

# What the names of this test's internet lead to.
NAMES = {
    "media.test": [PUBLIC],
    "rebound.test": ["127.0.0.1"],
    "linklocal.test": ["169.254.169.254"],
    "mapped.test": ["::ffff:127.0.0.1"],
    "private.test": ["10.0.0.7"],
    "twofaced.test": [PUBLIC, "127.0.0.1"],
}


def png_header(width: int, height: int, payload: bytes = b"") -> bytes:
    """A PNG that claims a size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", payload or zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")


def gif_of(num_frames: int) -> bytes:
    """An animation of tiny frames, a few bytes each."""
    frame = b"\x2c" + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + b"\x02\x02\x44\x01\x00"
    return b"GIF89a" + struct.pack("<HHBBB", 1, 1, 0x80, 0, 0) + b"\0" * 6 + frame * num_frames + b";"


def tiff_of(num_frames: int) -> bytes:
    file = io.BytesIO()
    frames = [Image.new("L", (1, 1), index % 256) for index in range(num_frames)]
    frames[0].save(file, "TIFF", save_all=True, append_images=frames[1:])
    return file.getvalue()


class Attacked:
    """The service, a host for media that counts who contacts it, and folders with and without secrets."""

    def __init__(self, address: str, media: str, folder: Path, visits: list[str], engine: EchoEngine) -> None:
        self.address, self.media, self.folder, self.visits, self.engine = address, media, folder, visits, engine
        self.port = int(media.rpartition(":")[2])
        self.client = httpx.Client(base_url=address, timeout=10, headers={"authorization": f"Bearer {KEY}"})

    def ask(self, *images: str, **fields: object) -> httpx.Response:
        return self.client.post("/v1/chat/completions", json=asking("what is this?", *images, **fields))

    def is_refused(self, status: int, code: str, *images: str, visits: tuple[str, ...] = ()) -> None:
        self.visits.clear()
        start = time.monotonic()
        response = self.ask(*images)
        assert time.monotonic() - start < 1
        refused(response, status, code)
        assert tuple(self.visits) == visits


def refused(response: httpx.Response, status: int, code: str) -> None:
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (response.status_code, error["code"]) == (status, code), error
    assert len(error["message"]) < 400


def media_host(visits: list[str]) -> FastAPI:
    app = FastAPI()

    @app.get("/{path:path}")
    async def serve(path: str) -> Response:
        visits.append(path)
        if path == "red.png":
            return Response(picture(), media_type="image/png")
        if path == "endless":
            return StreamingResponse(drip())
        if path.startswith("to/"):
            return Response(status_code=302, headers={"location": path.removeprefix("to/")})
        return Response(status_code=404)

    async def drip() -> AsyncIterator[bytes]:
        while True:
            yield b"x" * 200_000
            await asyncio.sleep(0)

    return app


@pytest.fixture(scope="module")
def attacked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Attacked]:
    root, visits, engine = tmp_path_factory.mktemp("attacked"), list[str](), EchoEngine()
    folder = root / "images"
    folder.mkdir()
    (folder / "red.png").write_bytes(picture())
    (root / "secret.png").write_bytes(picture())
    (folder / "link.png").symlink_to(root / "secret.png")
    with served(media_host(visits), "0.0.0.0") as media:
        port = media.rpartition(":")[2]
        hosts = [*NAMES, "localhost", "2130706433", "0x7f.1", "127.0.0.1", "[::ffff:7f00:1]", "[::1]"]

        async def resolve(host: str, wanted: int) -> list[str]:
            if host in NAMES:
                return NAMES[host]
            found = await asyncio.get_running_loop().getaddrinfo(host, wanted, type=socket.SOCK_STREAM)
            return [entry[4][0] for entry in found]

        settings = ServeSettings.parsed(
            {
                "model": "echo@somewhere",
                "allowed_media_domains": ",".join(f"{host}:{port}" for host in hosts),
                "allowed_local_media_path": str(folder),
                "max_body_bytes": "33554432",
                "body_timeout_s": "1",
                "media_timeout_s": "1",
                "max_image_frames": "64",
            }
        )
        [source] = settings.sources
        network = Network(resolve, lambda text: text == PUBLIC or is_public(text))
        replica = Replica(engine, source, settings, network)
        front = Front(LocalGateway({source: replica}), settings, [ApiKey("tester", digest(KEY))])
        with served(build_front(front)) as address:
            attacked = Attacked(address, media, folder, visits, engine)
            attacked.ask(data_uri(picture()))  # the first image starts the decoders, which counts for no attack
            yield attacked


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (png_header(12_000, 12_000), "image_too_large"),
        (png_header(60_000, 60_000, zlib.compress(b"\0" * 10_000_000)), "image_too_large"),
        (gif_of(100_000), "image_too_many_frames"),
        (tiff_of(80), "image_too_many_frames"),
        (b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0, 0, 0) + gif_of(1)[13:], "image_too_large"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "image_unreadable"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "image_unreadable"),
        (b"", "image_unreadable"),
    ],
    ids=["12000 px", "deflated", "gif", "tiff", "huge gif", "svg", "eps", "empty"],
)
def test_bombs_are_seen_from_their_header(attacked: Attacked, data: bytes, code: str) -> None:
    attacked.is_refused(400, code, data_uri(data))


@pytest.mark.parametrize(
    "host", ["2130706433", "0x7f.1", "127.0.0.1", "[::ffff:7f00:1]", "[::1]", "localhost", *list(NAMES)[1:]]
)
def test_no_address_inside_is_contacted(attacked: Attacked, host: str) -> None:
    """Although the operator let each of these names in."""
    attacked.is_refused(400, "media_address", f"http://{host}:{attacked.port}/red.png")


def test_hosts_ports_and_schemes_that_nobody_allowed(attacked: Attacked) -> None:
    port = attacked.port
    for place, code in [
        ("http://elsewhere.test/red.png", "media_domain"),
        ("http://media.test/red.png", "media_domain"),
        (f"http://media.test.evil.test:{port}/red.png", "media_domain"),
        (f"http://media.test:{port}@evil.test/red.png", "media_credentials"),
        (f"http://media.test:{port}\\@evil.test/red.png", "media_domain"),
        ("ftp://media.test/red.png", "media_scheme"),
        ("gopher://media.test/red.png", "media_scheme"),
        ("http://media.test:99999/", "media_url"),
        ("http://[::1/", "media_url"),
        ("http://xn--/", "media_url"),
        ("http://xn--a/red.png", "media_url"),
        ("http://xn--0.test/", "media_url"),
        (f"http://{'é' * 100}.test/", "media_url"),
        (f"http://{'a' * 64}.test/", "media_url"),
        (f"http://{'a.' * 200}test/", "media_url"),
        ("http://media..test/", "media_url"),
        ("http://me dia.test/", "media_url"),
        ("http://media.test/\x00", "media_url"),
        ("http://media.test/\r\nx: y", "media_url"),
        ("http://media.test:-1/", "media_url"),
        ("http://media.test:port/", "media_url"),
        ("http://[zz]/", "media_url"),
        ("http://]/", "media_url"),
        ("http://\u2100.test/", "media_url"),
        ("http:///red.png", "media_scheme"),
        ("http://media.test/" + "x" * 9000, "media_url"),
        ("QUJD" * 10_000, "media_url"),
        ("file://[", "media_local"),
        ("red.png", "media_scheme"),
        ("", "media_scheme"),
        ("data:image/png,plain", "media_data_uri"),
        ("data:image/png;base64,????", "media_data_uri"),
    ]:
        start = time.monotonic()
        response = attacked.ask(place)
        assert time.monotonic() - start < 1
        error = response.json()["error"]
        assert response.status_code == 400, (place, error)
        assert error["code"] in (code, "media_url"), (place, error)
    assert attacked.visits == []


def test_an_allowed_public_host_is_read(attacked: Attacked) -> None:
    answer = attacked.ask(f"http://media.test:{attacked.port}/red.png").json()
    assert answer["choices"][0]["message"]["content"] == "40x30 what is this?"


@pytest.mark.parametrize(
    ("location", "code"),
    [
        ("http://169.254.169.254/latest/meta-data", "media_domain"),
        ("http://linklocal.test:{port}/red.png", "media_address"),
        ("http://rebound.test:{port}/red.png", "media_address"),
        ("http://media.test:{port}/red.png", None),
        ("file:///etc/passwd", "media_scheme"),
        ("http://mapped.test:{port}/red.png", "media_address"),
        ("http://xn--/", "media_url"),
        ("http://[", "media_redirects"),
    ],
)
def test_each_hop_of_a_redirect_is_checked(attacked: Attacked, location: str, code: str | None) -> None:
    target = location.format(port=attacked.port)
    place = f"http://media.test:{attacked.port}/to/{target}"
    if code is None:
        assert attacked.ask(place).status_code == 200
    else:
        status = 422 if code == "media_redirects" else 400  # which address it was is the host's fault
        attacked.is_refused(status, code, place, visits=(f"to/{target}",))


def test_redirects_end(attacked: Attacked) -> None:
    loop = f"http://media.test:{attacked.port}/to/"
    refused(attacked.ask(loop), 400, "media_redirects")
    assert len(attacked.visits) <= 8


def test_an_endless_file_and_a_missing_one(attacked: Attacked) -> None:
    attacked.is_refused(400, "image_too_large", f"http://media.test:{attacked.port}/endless", visits=("endless",))
    attacked.is_refused(422, "media_status", f"http://media.test:{attacked.port}/none", visits=("none",))


@pytest.mark.parametrize(
    "place",
    [
        "file:///etc/passwd",
        "file://{folder}/../secret.png",
        "file://{folder}/%2e%2e/secret.png",
        "file://{folder}/link.png",
        "file://{folder}",
        "file://{folder}/none.png",
        "file://elsewhere{folder}/red.png",
        "file:///dev/zero",
        "file:///proc/self/environ",
        "file://{folder}/red.png%00.png",
    ],
)
def test_no_file_outside_the_folder_is_read(attacked: Attacked, place: str) -> None:
    attacked.is_refused(400, "media_local", place.format(folder=attacked.folder))


def test_a_file_inside_it_is(attacked: Attacked) -> None:
    assert attacked.ask(f"file://{attacked.folder}/red.png").status_code == 200


def test_wrong_and_missing_keys(attacked: Attacked) -> None:
    for header in ("Bearer wrong", f"Basic {KEY}", "", f"Bearer {KEY}x", "Bearer"):
        response = httpx.post(f"{attacked.address}/v1/chat/completions", json={}, headers={"authorization": header})
        refused(response, 401, "invalid_api_key")
        assert response.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        (b"{", "invalid_json", None),
        (b"", "invalid_json", None),
        (b"\xff\xfe", "invalid_json", None),
        (b"[" * 100_000, "invalid_json", None),
        (b"[]", "invalid_value", None),
        (json.dumps(asking("x", stop=["y"] * 10_000)).encode(), "invalid_value", "stop"),
        (json.dumps(asking("x", stop=["y" * 10_000])).encode(), "invalid_value", "stop.0"),
        (json.dumps(asking("x", temperature=float("nan"))).encode(), "invalid_value", "temperature"),
        (json.dumps(asking("x", top_p=float("inf"))).encode(), "invalid_value", "top_p"),
        (json.dumps(asking("x", temperature=1e300)).encode(), "invalid_value", "temperature"),
        (json.dumps(asking("x", max_tokens=-1)).encode(), "invalid_value", "max_tokens"),
        (json.dumps(asking("x", n=1000)).encode(), "invalid_value", "n"),
        (json.dumps(asking("x", n=100)).encode(), "too_many_choices", "n"),
        (json.dumps(asking("x", seed=2**80)).encode(), "invalid_value", "seed"),
        (json.dumps(asking("x", tools=[{}])).encode(), "invalid_value", "tools.0.type"),
        (json.dumps(asking("x", logit_bias={"1": 101})).encode(), "invalid_value", "logit_bias"),
        (json.dumps(asking("x", stream_options={"include_usage": True})).encode(), "invalid_value", "stream_options"),
        (json.dumps(asking("x" * 500_000)).encode(), "text_too_long", "messages"),
        (json.dumps(asking("x", *["data:,"] * 9)).encode(), "too_many_images", "messages"),
        (json.dumps({"model": "echo", "messages": []}).encode(), "invalid_value", "messages"),
        (json.dumps({"messages": [{"role": "user", "content": "x"}]}).encode(), "invalid_value", "model"),
        (
            json.dumps({"model": "echo", "messages": [{"role": "tool", "content": "x"}]}).encode(),
            "invalid_value",
            "messages.0.tool_call_id",
        ),
        (
            json.dumps({"model": "echo", "messages": [{"role": "assistant", "content": "x"}]}).encode(),
            "message_order",
            "messages",
        ),
    ],
)
def test_malformed_requests(attacked: Attacked, body: bytes, code: str, param: str | None) -> None:
    start = time.monotonic()
    response = attacked.client.post("/v1/chat/completions", content=body)
    assert time.monotonic() - start < 1
    refused(response, 400, code)
    assert response.json()["error"]["param"] == param


def test_no_refusal_repeats_the_payload(attacked: Attacked) -> None:
    secret = "c2VjcmV0" * 1000
    for broken in (asking("x", temperature=secret), asking(secret, what=secret), {"model": secret, "messages": secret}):
        assert "c2VjcmV0c2VjcmV0" not in attacked.client.post("/v1/chat/completions", json=broken).text


def raw(attacked: Attacked, head: str) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", int(attacked.address.rpartition(":")[2])), timeout=5)
    lines = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {KEY}\r\n{head}\r\n\r\n"
    connection.sendall(lines.encode())
    return connection


def test_a_declared_length_is_refused_from_the_header_alone(attacked: Attacked) -> None:
    start = time.monotonic()
    with raw(attacked, "content-length: 50000000") as connection:
        answer = connection.recv(4096)
    assert time.monotonic() - start < 1
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b'"body_too_large"' in answer + b""


def test_an_undeclared_length_is_refused_when_it_gets_too_long(attacked: Attacked) -> None:
    def chunks() -> Iterator[bytes]:
        for _ in range(50):
            yield b"x" * 1_000_000

    with contextlib.suppress(httpx.WriteError, httpx.ReadError):  # the server may hang up on what is left
        response = attacked.client.post("/v1/chat/completions", content=chunks())
        refused(response, 413, "body_too_large")


def test_a_slow_body_is_closed(attacked: Attacked) -> None:
    start = time.monotonic()
    with raw(attacked, "content-length: 1000") as connection:
        stop = threading.Event()

        def drip() -> None:
            with contextlib.suppress(OSError):
                while not stop.wait(0.1):
                    connection.sendall(b"x")

        threading.Thread(target=drip, daemon=True).start()
        answer = b""
        with contextlib.suppress(ConnectionResetError):  # what drips in after the answer meets a closed door
            while received := connection.recv(4096):
                answer += received
        stop.set()
    assert 0.9 < time.monotonic() - start < 2
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b'"body_timeout"' in answer


def test_other_clients_are_not_disturbed(attacked: Attacked) -> None:
    """While bombs come in from all sides, a plain question is answered within a second."""
    bomb = json.dumps(asking("what is this?", data_uri(gif_of(100_000)))).encode()
    stop = threading.Event()

    def attack() -> None:
        with httpx.Client(base_url=attacked.address, timeout=10, headers=attacked.client.headers) as client:
            while not stop.is_set():
                client.post("/v1/chat/completions", content=bomb)

    threads = [threading.Thread(target=attack) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        seconds = []
        for _ in range(5):
            start = time.monotonic()
            assert attacked.ask().json()["choices"][0]["message"]["content"] == "what is this?"
            seconds.append(time.monotonic() - start)
        assert statistics.median(seconds) < 1  # attackers and service share this test's process
    finally:
        stop.set()
        for thread in threads:
            thread.join()
