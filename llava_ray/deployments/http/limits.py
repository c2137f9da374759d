"""Limits on open requests and bytes in flight, per address or key and in total."""

import ipaddress
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from starlette.datastructures import Headers
from starlette.types import Scope

from llava_ray.deployments.http.auth import ApiKey, Bucket
from llava_ray.deployments.refusal import RefusalError, Refused

_Network = ipaddress.IPv4Network | ipaddress.IPv6Network

# The server in front (uvicorn, in Serve's proxy too) trusts X-Forwarded-For from here by default, and has then
# replaced the real address by the header's.
_BELIEVED_BY_SERVER = "127.0.0.1"
FORWARDED = "forwarded by 127.0.0.1"

MAX_ADDRESSES = 10_000  # whose rates are stored


class HeldAmounts:
    """Amounts held for a while, bounded for each holder and in total."""

    def __init__(self, total: int, per_holder: int) -> None:
        """Initialise the bounds of all holders together and of each one."""
        self.total = total
        self.per_holder = per_holder
        self.amounts: dict[str, int] = {}
        self.held = 0

    def take(self, holder: str, amount: int = 1) -> bool:
        """Add an amount; return False, without adding it, if it is too much."""
        mine = self.amounts.get(holder, 0) + amount
        if mine > self.per_holder or self.held + amount > self.total:
            return False
        self.amounts[holder] = mine
        self.held += amount
        return True

    def release(self, holder: str, amount: int = 1) -> None:
        """Release an amount."""
        self.held -= amount
        self.amounts[holder] -= amount
        if not self.amounts[holder]:  # bounded memory: idle holders are not stored
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
    """Return the refusal of a request over the limit of bytes in flight."""
    message = (
        f"the requests that are being answered hold too many bytes: at most {limits.per_holder:,} with one key or from "
        f"one address (max_bytes_in_flight_per_key) and {limits.total:,} in all (max_bytes_in_flight); try again"
    )
    return Refused(429, message, "too_many_bytes_in_flight", retry_after_s=2)


def holder_of(scope: Scope) -> str:
    """Return the holder of a request's bytes: its key's name or its address."""
    key: ApiKey | None = scope.get("api_key")
    return f"key {key.name}" if key is not None and key.sha256 else f"address {scope['client'][0]}"


class AddressRates:
    """A rate limit per address."""

    def __init__(self, per_minute: int, clock: Callable[[], float]) -> None:
        """Initialise with a rate and a clock in seconds."""
        self.per_minute = per_minute
        self.clock = clock
        self.buckets: dict[str, Bucket] = {}

    def admit(self, address: str, action: str) -> Refused | None:
        """Count one action; return a refusal if it exceeds the rate."""
        bucket = self.buckets.pop(address, None) or Bucket(self.per_minute, self.clock())
        self.buckets[address] = bucket  # moved to the end: the first are the least recently used
        if len(self.buckets) > MAX_ADDRESSES:
            del self.buckets[next(iter(self.buckets))]
        wait = bucket.take(self.clock())
        if wait <= 0:
            return None
        message = f"more than {self.per_minute} {action} a minute from one address; wait {wait:.0f} s"
        return Refused(429, message, "rate_limit_exceeded", retry_after_s=max(1, round(wait + 0.5)))


def client_address(scope: Scope, trusted: Sequence[_Network]) -> str:
    """Return the client's address: the peer, or the one that trusted proxies forward."""
    peer = str((scope.get("client") or ("unknown",))[0])
    forwarded = [part.strip() for value in Headers(scope=scope).getlist("x-forwarded-for") for part in value.split(",")]
    if not forwarded:
        return peer
    if any(peer == _without_port(part) for part in forwarded) and not _is_in(_BELIEVED_BY_SERVER, trusted):
        return FORWARDED
    # From the right: each proxy appends its peer, and the first that is not one of our proxies is the client.
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
    """Return whether a text is an IP address."""
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _is_in(text: str, networks: Sequence[_Network]) -> bool:
    """Return whether a text is an address in one of the networks."""
    return _is_address(text) and any(ipaddress.ip_address(text) in network for network in networks)
