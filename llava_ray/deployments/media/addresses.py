"""Allowed addresses: names are resolved once, and the checked address is the one that is connected to."""

import asyncio
import ipaddress
import re
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from yarl import URL

from llava_ray.deployments.refusal import RefusalError, refuse

# A resolver of names to addresses as text: the system's, or a test's.
_Resolve = Callable[[str, int], Awaitable[list[str]]]

_Address = ipaddress.IPv4Address | ipaddress.IPv6Address

# Ranges that Python's is_global counts as global but that embed IPv4 addresses (6to4, Teredo, NAT64).
_TRANSLATED = tuple(ipaddress.ip_network(text) for text in ("2002::/16", "2001::/32", "64:ff9b::/96", "64:ff9b:1::/48"))

_DEFAULT_PORTS = (80, 443)

_MAX_URL_CHARS = 8192
_MAX_HOST_CHARS, _MAX_LABEL_CHARS = 253, 63  # RFC 1035
_SHOWN_HOST_CHARS = 100
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_NOT_IN_HOSTS = re.compile(r"[^0-9A-Za-z._:%-]")


async def _resolve_by_system(host: str, port: int) -> list[str]:
    """Resolve with the system's resolver, off the event loop. Raises OSError."""
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(address[0]) for *_, address in found]


def is_public(text: str) -> bool:
    """Return whether an address is public: not of this machine, a private network or a reserved range."""
    address: _Address = ipaddress.ip_address(text.partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return is_public(str(address.ipv4_mapped))
        if any(address in network for network in _TRANSLATED):
            return False
    return address.is_global and not address.is_multicast and not address.is_reserved


def read_url(place: str) -> URL:
    """Parse an address as a URL with a valid host. Raises RefusalError.

    yarl detects some errors when it parses a URL, and others when its parts are accessed.
    """
    if len(place) > _MAX_URL_CHARS:
        raise _not_a_url(f"has {len(place):,} characters, at most {_MAX_URL_CHARS:,} are read; is it base64?")
    if _CONTROL.search(place.strip()):
        raise _not_a_url("holds control characters")
    try:
        url = URL(place.strip())
        host, name, _ = url.raw_host or "", url.host, url.port
        bytes(url)
    except ValueError as error:
        raise _not_a_url(f"is not a URL ({type(error).__name__})") from None
    del name
    labels = host.removesuffix(".").split(".") if host else []
    if len(host) > _MAX_HOST_CHARS or not all(0 < len(label) <= _MAX_LABEL_CHARS for label in labels):
        raise _not_a_url(f"names a host of {len(host):,} characters that cannot be a name")
    if _NOT_IN_HOSTS.search(host):
        raise _not_a_url("names a host with spaces or characters that no name has")
    return url


def _not_a_url(what: str) -> RefusalError:
    """Return the error for an invalid image address."""
    return refuse(
        400, f"an image address {what}; send a data:image/png;base64,… or https: one", "media_url", "messages"
    )


def host_of(url: URL) -> str:
    """Return a host's name, truncated for a message."""
    return (url.raw_host or "")[:_SHOWN_HOST_CHARS]


def check_domain(url: URL, allowed: tuple[str, ...]) -> None:
    """Check that the URL's host (and port, other than 80 and 443) is allowed. Raises RefusalError."""
    if url.scheme not in ("http", "https") or not url.host:
        raise refuse(
            400,
            f"image address of scheme {url.scheme[:20]!r}: expected data:, http: or https:",
            "media_scheme",
            "messages",
        )
    if url.user is not None or url.password is not None:
        raise refuse(400, "image address with a user name or password: leave it out", "media_credentials", "messages")
    host = (url.raw_host or "").lower().rstrip(".")
    if not any(matches(host, url.port, entry.lower()) for entry in allowed):
        raise refuse(
            400,
            f"images from {host_of(url)!r} (port {url.port}) are not fetched here; send a data: URI, or have the "
            "service started with the host in allowed_media_domains",
            "media_domain",
            "messages",
        )


def matches(host: str, port: int | None, entry: str) -> bool:
    """Return whether ``entry`` (``host``, ``.domain`` or either with ``:port``) allows this host and port."""
    name, _, wanted = entry.rpartition(":") if entry.rpartition(":")[2].isdigit() else (entry, "", "")
    fits = host.endswith(name) and len(host) > len(name) if name.startswith(".") else host == name.strip("[]")
    return fits and (port == int(wanted) if wanted else port in _DEFAULT_PORTS)


@dataclass(frozen=True)
class Network:
    """A resolver and a test of public addresses: the system's, or a test's own."""

    resolve: _Resolve = _resolve_by_system
    is_public: Callable[[str], bool] = is_public


async def checked_address(url: URL, network: Network, *, allow_private: bool) -> str:
    """Resolve the URL's host to an allowed address.

    Raises RefusalError if any of its addresses is not public: a name that resolves to both kinds is not trusted.
    """
    host, port = url.raw_host or "", url.port or 0
    try:
        addresses = await network.resolve(host, port)
    except (OSError, UnicodeError):
        addresses = []
    if not addresses:
        raise refuse(422, f"image host {host[:100]!r} has no address", "media_unresolved", "messages")
    if not allow_private and not all(network.is_public(address) for address in addresses):
        raise refuse(
            400,
            f"image host {host[:100]!r} resolves to an address that is not public; it is not contacted",
            "media_address",
            "messages",
        )
    return addresses[0]
