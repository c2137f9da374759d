"""Links to images that are dead, busy, slow, endless or nobody's: tried again in bounds, then said of the record."""

import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from llava_ray.errors import ImageError
from llava_ray.images import fetching
from llava_ray.images.reading import read_bytes

ASKED: Counter[str] = Counter()


class Handler(BaseHTTPRequestHandler):
    """/status/N answers N; /busy/N/T answers N so often, and then the file; others misbehave by name."""

    def do_GET(self) -> None:
        ASKED[self.path] += 1
        parts = self.path.split("/")[1:]
        if parts[0] == "status":
            return self.answer(int(parts[1]), b"<html>no</html>")
        if parts[0] == "busy" and ASKED[self.path] <= int(parts[2]):
            return self.answer(int(parts[1]), b"wait", {"Retry-After": parts[3]} if len(parts) > 3 else {})
        if parts[0] == "redirect":
            return self.answer(302, b"", {"Location": "/file" if parts[1] == "once" else self.path})
        if parts[0] == "long":
            return self.answer(200, b"x", {"Content-Length": str(10**12)})
        if parts[0] == "endless":
            self.send_response(200)
            self.end_headers()
            try:
                while True:
                    self.wfile.write(bytes(2**16))
            except OSError:
                return None
        if parts[0] == "slow":
            time.sleep(1)
        if parts[0] == "reset":
            self.connection.close()
            return None
        return self.answer(200, b"file")

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture(scope="module")
def base() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "PAUSES_S", (0.01, 0.02, 0.03))
    monkeypatch.setattr(fetching, "ONE_TRY_S", 0.5)
    monkeypatch.setattr(fetching, "MAX_BYTES", 2**20)
    fetching._HOSTS.clear()
    ASKED.clear()


def refused(url: str) -> ImageError:
    with pytest.raises(ImageError) as caught:
        read_bytes(url)
    assert "\n" not in str(caught.value)
    return caught.value


DEAD = [400, 401, 403, 404, 410, 451]


@pytest.mark.parametrize("status", DEAD)
def test_dead_links_are_said_at_once_with_their_status(base: str, status: int) -> None:
    error = refused(f"{base}/status/{status}")
    assert error.reason == ("image_missing" if status in (404, 410) else "image_unreadable")
    assert f"answered {status}" in str(error)
    assert ASKED[f"/status/{status}"] == 1


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504, 599])
def test_busy_hosts_are_asked_again(base: str, status: int) -> None:
    assert read_bytes(f"{base}/busy/{status}/2") == b"file"
    error = refused(f"{base}/status/{status}")
    assert error.reason == "image_unreadable"
    assert f"answered {status}" in str(error)
    assert "4 tries" in str(error)
    assert ASKED[f"/status/{status}"] == 4


def test_a_host_may_ask_for_a_pause(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(fetching.time, "sleep", pauses.append)
    assert read_bytes(f"{base}/busy/429/1/7") == b"file"
    assert read_bytes(f"{base}/busy/503/1/9999") == b"file"
    assert pauses == [7.0, fetching.LONGEST_PAUSE_S]
    monkeypatch.setattr(fetching, "TOTAL_S", 5.0)
    refused(f"{base}/busy/429/9/8")
    assert ASKED["/busy/429/9/8"] == 1


@pytest.mark.parametrize(
    ("header", "seconds"),
    [(None, 0), ("3", 3), ("-3", 0), ("nan", 0), ("soon", 0), ("inf", 30), ("Wed, 21 Oct 2015 07:28:00 GMT", 0)],
)
def test_pauses_are_read_in_any_form(header: str | None, seconds: float) -> None:
    assert fetching._asked_pause(header) == seconds


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/slow", "no complete answer within 0.5 s"),
        ("/reset", "4 tries"),
        ("/endless", "more than 1,048,576 bytes"),
        ("/long", "1,000,000,000,000 bytes"),
        ("/redirect/ever", "TooManyRedirects"),
    ],
)
def test_hosts_that_misbehave_cost_a_bounded_time(base: str, path: str, words: str) -> None:
    assert words in str(refused(base + path))


def test_redirects_are_followed(base: str) -> None:
    assert read_bytes(f"{base}/redirect/once") == b"file"


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:1/a.png", "http://nobody.invalid/a.png", "http://[::1", "http://", "http://a b/\0"]
)
def test_addresses_of_nobody_are_the_records_fault(url: str) -> None:
    assert refused(url).reason in ("image_unreadable", "image_missing")


def test_a_dead_host_is_soon_left_alone(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "ONE_TRY_AFTER", 2)
    monkeypatch.setattr(fetching, "LEAVE_AFTER", 4)
    for number in range(10):
        error = refused(f"{base}/status/500/{number}")
    assert "not requested: the last 4 files of this host failed, with the host answered 500" in str(error)
    assert sum(ASKED.values()) == 4 + 4 + 1 + 1
    monkeypatch.setattr(fetching, "ASK_EVERY_S", 0.0)
    fetching._HOSTS[base.removeprefix("http://")].ask_at = 0.0
    assert read_bytes(f"{base}/file") == b"file"  # asked now and then, and back when it answers
    assert read_bytes(f"{base}/file") == b"file"
