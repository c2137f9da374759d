"""How much is held at once: open requests, bytes that are being read or answered, by address and by key."""

import ipaddress
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import httpx
import pytest
from serving import EchoEngine, asking, served

from llava_ray.deployments.chat_page.sessions import UnreadEvents
from llava_ray.deployments.front import build_front
from llava_ray.deployments.gateway import LocalGateway
from llava_ray.deployments.http.auth import ApiKey, digest
from llava_ray.deployments.http.limits import FORWARDED, AddressRates, HeldAmounts, client_address
from llava_ray.deployments.http.routes import Front
from llava_ray.deployments.refusal import RefusalError
from llava_ray.deployments.replica import Replica
from llava_ray.deployments.settings import ServeSettings
from llava_ray.errors import ConfigError

ALICE, BOB = "alice's key of sixteen characters", "bob's key of sixteen characters"
MIB = 2**20


@contextmanager
def api(*, keys: bool = False, **settings: object) -> Iterator[tuple[str, Front]]:
    told = ServeSettings.parsed({"model": "echo@x", **settings})
    [source] = told.sources
    known = [ApiKey("alice", digest(ALICE)), ApiKey("bob", digest(BOB))] if keys else []
    front = Front(LocalGateway({source: Replica(EchoEngine(), source, told)}), told, known)
    with served(build_front(front)) as address:
        yield address, front


@contextmanager
def begun(address: str, request: str) -> Iterator[socket.socket]:
    """A request whose body does not come."""
    port = int(address.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
        connection.sendall(request.replace("\n", "\r\n").encode() + b"\r\n\r\n")
        yield connection


def post(num_bytes: int, key: str = "") -> str:
    bearer = f"\nauthorization: Bearer {key}" if key else ""
    return f"POST /v1/chat/completions HTTP/1.1\nhost: x\ncontent-length: {num_bytes}{bearer}"


def test_held_amounts_are_bounded_for_each_and_for_all() -> None:
    held = HeldAmounts(total=10, per_holder=6)
    assert [held.take("a", 6), held.take("a"), held.take("b", 5), held.take("b", 4)] == [True, False, False, True]
    held.release("a", 6)
    held.release("b", 4)
    assert (held.held, held.amounts) == (0, {})


def test_addresses_have_rates_of_their_own_and_few_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llava_ray.deployments.http.limits.MAX_ADDRESSES", 3)
    now = [0.0]
    rates = AddressRates(8, lambda: now[0])
    assert [rates.admit("a", "logins") is None for _ in range(3)] == [True, True, False]
    refused = rates.admit("a", "logins")
    assert refused is not None
    assert (refused.status, refused.retry_after_s) == (429, 8)
    now[0] = 7.5
    assert rates.admit("a", "logins") is None
    for other in "bcd":
        rates.admit(other, "logins")
    assert list(rates.buckets) == ["b", "c", "d"]


@pytest.mark.parametrize(
    ("peer", "forwarded", "trusted", "found"),
    [
        ("9.9.9.9", "", "", "9.9.9.9"),
        ("9.9.9.9", "1.1.1.1", "", "9.9.9.9"),
        ("10.0.0.1", "1.1.1.1", "10.0.0.0/8", "1.1.1.1"),
        ("10.0.0.1", "1.1.1.1, 2.2.2.2, 10.0.0.7", "10.0.0.0/8", "2.2.2.2"),
        ("10.0.0.1", "nonsense", "10.0.0.0/8", "10.0.0.1"),
        ("10.0.0.1", "[2001:db8::1]:443", "10.0.0.0/8", "2001:db8::1"),
        ("10.0.0.1", "1.1.1.1:55", "10.0.0.0/8", "1.1.1.1"),
        # The server in front took the header's word; nobody told us to.
        ("1.1.1.1", "1.1.1.1", "", FORWARDED),
        ("1.1.1.1", "1.1.1.1", "127.0.0.1", "1.1.1.1"),
    ],
)
def test_who_asks(peer: str, forwarded: str, trusted: str, found: str) -> None:
    headers = [(b"x-forwarded-for", forwarded.encode())] if forwarded else []
    networks = [ipaddress.ip_network(trusted)] if trusted else []
    assert client_address({"type": "http", "client": (peer, 1), "headers": headers}, networks) == found


def test_a_proxy_without_an_address_is_refused() -> None:
    with pytest.raises(ConfigError, match="'proxy-local' is no address"):
        ServeSettings.parsed({"model": "x", "trusted_proxies": "proxy-local"})


@pytest.mark.slow
@pytest.mark.parametrize("method", ["OPTIONS", "GET", "PUT", "DELETE", "PATCH", "TRACE"])
def test_no_method_but_post_has_a_body_that_is_read(method: str) -> None:
    with api(keys=True) as (address, front):
        sent = f"{method} /v1/chat/completions HTTP/1.1\nhost: x\ncontent-length: 31000000"
        with begun(address, sent) as connection:
            assert connection.recv(4096).startswith(b"HTTP/1.1 401")
        with begun(address, f"{sent}\nauthorization: Bearer {ALICE}") as connection:
            assert connection.recv(4096).startswith((b"HTTP/1.1 405", b"HTTP/1.1 404"))
        assert front.bytes_in_flight.held == 0


@pytest.mark.slow
def test_a_browsers_preflight_needs_no_key() -> None:
    with api(keys=True, cors_allowed_origins="https://a.example") as (address, _):
        headers = {"origin": "https://a.example", "access-control-request-method": "POST"}
        assert httpx.options(f"{address}/v1/chat/completions", headers=headers).status_code == 200


@pytest.mark.slow
def test_bytes_in_flight_are_bounded_by_key_and_in_total() -> None:
    settings = {"max_body_bytes": 4 * MIB, "max_bytes_in_flight": 10 * MIB, "max_bytes_in_flight_per_key": 8 * MIB}
    with api(keys=True, body_timeout_s=3.0, **settings) as (address, front), ExitStack() as stack:
        for key, num_bytes in ((ALICE, 4 * MIB), (ALICE, 3 * MIB)):
            stack.enter_context(begun(address, post(num_bytes, key)))
        while front.bytes_in_flight.held < 7 * MIB:
            pass
        for key, num_bytes in ((ALICE, 2 * MIB), (BOB, 4 * MIB)):  # over alice's own bound, over that of all
            with begun(address, post(num_bytes, key)) as connection:
                answer = connection.recv(65536)
                assert answer.startswith(b"HTTP/1.1 429")
                assert b"too_many_bytes_in_flight" in answer
                assert b"retry-after" in answer
        bearer = {"authorization": f"Bearer {BOB}"}
        chat = f"{address}/v1/chat/completions"
        assert httpx.post(chat, json=asking("small ones go on"), headers=bearer).status_code == 200
        stack.close()
        while front.bytes_in_flight.held:
            pass
        assert httpx.post(chat, json=asking("x" * 100), headers=bearer).status_code == 200
        while front.bytes_in_flight.held:  # given back once the answer has gone
            pass
        assert front.bytes_in_flight.amounts == {}


@pytest.mark.slow
def test_bodies_that_arrive_without_a_length_are_counted_as_they_come() -> None:
    with api(max_body_bytes=MIB, max_bytes_in_flight=MIB, max_bytes_in_flight_per_key=MIB) as (address, front):
        chunks = (b"x" * 65536 for _ in range(100))
        response = httpx.post(f"{address}/v1/chat/completions", content=chunks)
        assert (response.status_code, response.json()["error"]["code"]) == (413, "body_too_large")
        assert front.bytes_in_flight.held == 0


def test_events_that_nobody_reads_are_counted_and_dropped() -> None:
    now, dropped = [0.0], list[str]()
    held = HeldAmounts(total=10_000, per_holder=7_000)
    unread = UnreadEvents(held, dropped.append, lambda: now[0])
    unread.add("one", "alice", 2000)
    with pytest.raises(RefusalError, match="hold too many bytes"):
        unread.add("one", "alice", 2000)
    unread.add("two", "bob", 1000)
    with unread.reading("one"):
        now[0] = 100.0
        unread.drop_old()
        assert dropped == ["two"]  # one is being read, however long that takes
        unread.add("one", "mallory", 300)
    assert (held.held, unread.sessions) == (0, {})
    with unread.reading("unknown"):
        pass
