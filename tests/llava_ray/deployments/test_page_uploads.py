"""Uploads to the page: their bytes held while they come, what broke off deleted, the odd ones refused."""

import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from page_client import PageClient, build_page, chat_with, image_part
from pictures import picture
from serving import served

from llava_ray.deployments.chat_page.uploads import LEAST_FILE_BYTES, PARTIAL_S, Uploads
from llava_ray.deployments.http.routes import Front

FORM = {"content-type": "multipart/form-data; boundary=X"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    place = tmp_path_factory.mktemp("uploads")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(place))
        yield place


@pytest.fixture(scope="module")
def page(folder: Path) -> Iterator[tuple[PageClient, Front]]:
    app, front = build_page(max_body_bytes=1 << 20, max_bytes_in_flight=4 << 20, max_bytes_in_flight_per_key=2 << 20)
    with served(app) as address:
        yield PageClient(address), front


def form(field: str, content: bytes) -> bytes:
    return f"--X\r\nContent-Disposition: form-data; {field}\r\n\r\n".encode() + content + b"\r\n--X--\r\n"


def begin_upload(client: PageClient, field: str, num_bytes: int) -> socket.socket:
    """Send an upload but for its end."""
    url = client.http.base_url
    connection = socket.create_connection((url.host, url.port or 0), timeout=10)
    body = form(field, b"x" * num_bytes)
    head = f"POST /gradio_api/upload HTTP/1.1\r\nhost: x\r\ncontent-type: {FORM['content-type']}\r\n"
    connection.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body[:-1])
    return connection


def wait_for(front: Front, *, num_bytes: int) -> None:
    for _ in range(200):
        if front.bytes_in_flight.held == num_bytes:
            return
        threading.Event().wait(0.05)
    raise AssertionError(f"{front.bytes_in_flight.held} bytes are held")


@pytest.mark.slow
@pytest.mark.parametrize("field", ['name="text"', 'name="files"; filename="a.png"'])
def test_the_bytes_of_uploads_are_held_while_they_come(page: tuple[PageClient, Front], field: str) -> None:
    client, front = page
    size = len(form(field, b"x" * 1_500_000))
    connection = begin_upload(client, field, 1_500_000)
    wait_for(front, num_bytes=size)
    response = client.http.post("/gradio_api/upload", content=form(field, b"x" * 1_500_000), headers=FORM)
    assert (response.status_code, response.json()["error"]["code"]) == (429, "too_many_bytes_in_flight")
    connection.close()
    wait_for(front, num_bytes=0)
    assert client.upload(picture())


@pytest.mark.slow
def test_an_upload_over_the_bytes_of_one_user_is_too_large(page: tuple[PageClient, Front]) -> None:
    client, front = page

    def chunks() -> Iterator[bytes]:
        yield form('name="files"; filename="a.png"', b"")[:-8]
        for _ in range(3):
            yield b"x" * (1 << 20)

    for content in (form('name="text"', b"x" * (3 << 20)), chunks()):
        response = client.http.post("/gradio_api/upload", content=content, headers=FORM)
        assert (response.status_code, response.json()["error"]["code"]) == (413, "body_too_large")
    wait_for(front, num_bytes=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("address", "content", "status"),
    [
        ("/gradio_api/upload?upload_id=a", form('name="text"', b"x"), 400),
        ("/gradio_api/upload?upload_id=" + "a" * 65, form('name="files"; filename="a.png"', b"x"), 400),
        ("/gradio_api/upload", form('name="files"', b"x"), 400),
        ("/gradio_api/upload", b"no form", 400),
    ],
)
def test_what_is_no_upload_is_refused(
    page: tuple[PageClient, Front], address: str, content: bytes, status: int
) -> None:
    assert page[0].http.post(address, content=content, headers=FORM).status_code == status


@pytest.mark.slow
@pytest.mark.parametrize(
    "asked", ["bytes=0-3", "bytes=0-,0-", "bytes=9999999-", "bytes=--1", "bytes=" + "9" * 5000 + "-"]
)
def test_a_file_is_sent_whole_whatever_range_is_asked_for(page: tuple[PageClient, Front], asked: str) -> None:
    client, _ = page
    path = client.upload(picture())
    response = client.http.get(f"/gradio_api/file={path}", headers={"range": asked})
    assert (response.status_code, response.content) == (200, picture())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["deep_link", "deep%5flink", "d%65ep_link", "%64eep%5Flink"])
def test_no_spelling_of_a_deep_link_is_followed(page: tuple[PageClient, Front], name: str) -> None:
    for path in ("/", "/config", "/config/"):
        assert page[0].http.get(f"{path}?model=echo&{name}=x").status_code == 404


@pytest.mark.slow
@pytest.mark.parametrize("number", [b"NaN", b"Infinity", b"-Infinity", b"1e999"])
def test_a_slider_has_a_number(page: tuple[PageClient, Front], number: bytes) -> None:
    client, _ = page
    begin = b'{"fn_index": %d, "session_hash": "s", "data": [[], "echo", ' % client.number_of("log_turn")
    for place in range(3):
        numbers = b", ".join(number if other == place else b"1" for other in range(3))
        response = client.http.post("/gradio_api/queue/join", content=begin + numbers + b", false]}")
        assert (response.status_code, response.json()["error"]["code"]) == (400, "page_event")


@pytest.mark.slow
def test_a_chat_and_a_body_of_one_user_have_one_allowance(page: tuple[PageClient, Front]) -> None:
    client, front = page
    path = client.upload(b"x" * 700_000)
    number, data = client.number_of("log_turn"), [chat_with(image_part(path)), "echo", 0.2, 0.7, 16, False]
    held: list[dict[str, int]] = []
    take = front.bytes_in_flight.take

    def remember(holder: str, amount: int = 1) -> bool:
        taken = take(holder, amount)
        held.append(dict(front.bytes_in_flight.amounts))
        return taken

    front.bytes_in_flight.take = remember  # type: ignore[method-assign]
    try:
        client.join(number, data)
        assert "data:image/png;base64," in client.outcome()["data"][0]
        assert {name for amounts in held for name in amounts} == {"address 127.0.0.1"}
        assert max(sum(amounts.values()) for amounts in held) > 900_000  # the image as it is in a request
        with front.bytes_in_flight.hold("address 127.0.0.1", 1_500_000, Any):
            client.join(number, data)
            assert "too many bytes" in str(client.outcome())
        with front.bytes_in_flight.hold("address 127.0.0.2", 1_500_000, Any):
            client.join(number, data)
            assert "data:image/png;base64," in client.outcome()["data"][0]
    finally:
        front.bytes_in_flight.take = take  # type: ignore[method-assign]


def test_small_files_count_as_larger_ones(tmp_path: Path) -> None:
    uploads = Uploads(tmp_path, max_files=4, max_bytes=100)
    for number in range(3):
        (tmp_path / f"{number}").mkdir()
        (tmp_path / f"{number}" / "a.png").write_bytes(b"")
    (tmp_path / "0" / "b.png").write_bytes(b"x" * 2 * LEAST_FILE_BYTES)
    assert uploads.total_bytes() == 5 * LEAST_FILE_BYTES


def test_what_broke_off_is_deleted_after_a_while(tmp_path: Path) -> None:
    uploads = Uploads(tmp_path / "uploads", max_files=4, max_bytes=100)
    uploads.delete_partial()
    kept = tmp_path / "uploads" / "digest" / "whole.png"
    kept.parent.mkdir(parents=True)
    old, new, link = (tmp_path / "uploads" / name for name in ("tmpold", "tmpnew", "link"))
    for place in (kept, old, new):
        place.write_bytes(b"x")
    link.symlink_to(kept)
    before = time.time() - PARTIAL_S - 10
    for place in (kept, old):
        os.utime(place, (before, before))
    uploads.delete_partial()
    assert [place.exists() for place in (kept, old, new, link)] == [True, False, True, True]
