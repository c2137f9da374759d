"""How much one client and all together may hold at once: open requests and bytes, counted by address or key."""

import ipaddress
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from starlette.datastructures import Headers
from starlette.types import Scope

from llava_ray.deployments.http.auth import ApiKey, Bucket
from llava_ray.deployments.refusal import RefusalError, Refused

_Network = ipaddress.IPv4Network | ipaddress.IPv6Network

# The server in front (uvicorn, in Serve's proxy too) believes X-Forwarded-For from here unless it is told otherwise,
# and has then put what the header says in place of the real address.
_BELIEVED_BY_SERVER = "127.0.0.1"
FORWARDED = "forwarded by 127.0.0.1"

MAX_ADDRESSES = 10_000  # whose rates are remembered


class HeldAmounts:
    """Amounts that are held for a while, bounded for each holder and in total."""

    def __init__(self, total: int, per_holder: int) -> None:
        """Bound all holders together by ``total`` and each one by ``per_holder``."""
        self.total = total
        self.per_holder = per_holder
        self.amounts: dict[str, int] = {}
        self.held = 0

    def take(self, holder: str, amount: int = 1) -> bool:
        """Take an amount, or nothing and return False if it is too much."""
        mine = self.amounts.get(holder, 0) + amount
        if mine > self.per_holder or self.held + amount > self.total:
            return False
        self.amounts[holder] = mine
        self.held += amount
        return True

    def release(self, holder: str, amount: int = 1) -> None:
        """Give an amount back that was taken."""
        self.held -= amount
        self.amounts[holder] -= amount
        if not self.amounts[holder]:  # whoever comes once is not remembered
            del self.amounts[holder]

    @contextmanager
    def hold(self, holder: str, amount: int, refused: Refused) -> Iterator[None]:
        """Hold an amount while the block runs. Raises RefusalError with ``refused`` if it is too much."""
        if not self.take(holder, amount):
            raise RefusalError(refused)
        try:
            yield
        finally:
            self.release(holder, amount)


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


class AddressRates:
    """So many acts a minute from each address."""

    def __init__(self, per_minute: int, clock: Callable[[], float]) -> None:
        """Count by ``clock``, in seconds."""
        self.per_minute = per_minute
        self.clock = clock
        self.buckets: dict[str, Bucket] = {}

    def admit(self, address: str, act: str) -> Refused | None:
        """Count one act; return a refusal if it is one too many."""
        bucket = self.buckets.pop(address, None) or Bucket(self.per_minute, self.clock())
        self.buckets[address] = bucket  # at the end: the first are those that have been quiet for longest
        if len(self.buckets) > MAX_ADDRESSES:
            del self.buckets[next(iter(self.buckets))]
        wait = bucket.take(self.clock())
        if wait <= 0:
            return None
        message = f"more than {self.per_minute} {act} a minute from one address; wait {wait:.0f} s"
        return Refused(429, message, "rate_limit_exceeded", retry_after_s=max(1, round(wait + 0.5)))


def client_address(scope: Scope, trusted: Sequence[_Network]) -> str:
    """Return who sent a request: the peer, or what a chain of trusted proxies says of it."""
    peer = str((scope.get("client") or ("unknown",))[0])
    forwarded = [part.strip() for value in Headers(scope=scope).getlist("x-forwarded-for") for part in value.split(",")]
    if not forwarded:
        return peer
    if any(peer == _without_port(part) for part in forwarded) and not _is_in(_BELIEVED_BY_SERVER, trusted):
        return FORWARDED
    # From the right: each proxy appends whom it heard, and the first that is no proxy of ours is the client.
    for address in (peer, *map(_without_port, reversed(forwarded))):
        peer = address if _is_address(address) else peer
        if not _is_in(address, trusted):
            break
    return peer


def _without_port(text: str) -> str:
    """Return the address of ``1.2.3.4:567`` or ``[::1]:567``."""
    if text.startswith("["):
        return text[1:].partition("]")[0]
    return text.partition(":")[0] if text.count(":") == 1 else text


def _is_address(text: str) -> bool:
    """Whether a text is an IP address."""
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _is_in(text: str, networks: Sequence[_Network]) -> bool:
    """Whether a text is an address of one of the networks."""
    return _is_address(text) and any(ipaddress.ip_address(text) in network for network in networks)
