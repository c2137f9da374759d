"""Fetching of one image over http(s): every redirect checked, addresses pinned, bytes and time bounded."""

import asyncio
import socket
from dataclasses import dataclass

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from llava_ray.deployments.media.addresses import (
    Network,
    check_domain,
    checked_address,
    host_of,
    read_url,
)
from llava_ray.deployments.refusal import refuse

_CHUNK = 64 * 1024
_REDIRECTS = (301, 302, 303, 307, 308)
_TRY_AGAIN = (408, 425, 429)


@dataclass(frozen=True)
class FetchLimits:
    """The limits of fetching: domains, bytes, time and redirects."""

    allowed_domains: tuple[str, ...]
    max_bytes: int
    timeout_s: float
    max_redirects: int
    allow_private: bool = False


class Pinned(AbstractResolver):
    """A resolver with one fixed address: no second lookup between check and connection (DNS rebinding)."""

    def __init__(self, host: str, address: str) -> None:
        """Initialise with the checked ``address`` of ``host``."""
        self.host = host
        self.address = address

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        """Return the address for any requested family."""
        del family
        if host != self.host:
            raise OSError(f"{host!r} was not checked")
        kind = socket.AF_INET6 if ":" in self.address else socket.AF_INET
        return [
            ResolveResult(
                hostname=host, host=self.address, port=port, family=kind, proto=0, flags=socket.AI_NUMERICHOST
            )
        ]

    async def close(self) -> None:
        """Do nothing: there is no connection to close."""


async def fetch(place: str, limits: FetchLimits, network: Network) -> bytes:
    """Fetch the bytes at ``place``, contacting allowed hosts only. Raises RefusalError."""
    url = read_url(place)
    try:
        async with asyncio.timeout(limits.timeout_s):
            for _ in range(limits.max_redirects + 1):
                found = await _one_hop(url, limits, network)
                if isinstance(found, bytes):
                    return found
                url = found
    except TimeoutError:
        raise refuse(
            504,
            f"image host {host_of(url)!r} did not answer within {limits.timeout_s:g} s (media_timeout_s)",
            "media_timeout",
            "messages",
        ) from None
    except (aiohttp.ClientError, OSError, ValueError) as error:
        raise refuse(
            422,
            f"image host {host_of(url)!r} could not be read from ({type(error).__name__})",
            "media_unreachable",
            "messages",
        ) from None
    raise refuse(400, f"more than {limits.max_redirects} redirects (max_redirects)", "media_redirects", "messages")


async def _one_hop(url: URL, limits: FetchLimits, network: Network) -> bytes | URL:
    """Request a checked ``url`` and return its bytes, or the URL of a redirect."""
    check_domain(url, limits.allowed_domains)
    address = await checked_address(url, network, allow_private=limits.allow_private)
    connector = aiohttp.TCPConnector(
        resolver=Pinned(url.raw_host or "", address), use_dns_cache=False, force_close=True
    )
    # Without trust_env no proxy of the environment is used, and without cookies no state crosses redirects.
    async with (
        aiohttp.ClientSession(
            connector=connector, cookie_jar=aiohttp.DummyCookieJar(), auto_decompress=False
        ) as session,
        session.get(
            url, allow_redirects=False, headers={"accept": "image/*", "accept-encoding": "identity"}
        ) as response,
    ):
        if response.status in _REDIRECTS:
            return _redirected(url, response.headers.get("location", ""))
        if response.status >= 400:
            status = 503 if response.status >= 500 or response.status in _TRY_AGAIN else 422
            raise refuse(status, f"image host {host_of(url)!r} answered {response.status}", "media_status", "messages")
        return await _read_within(response, limits.max_bytes)


def _redirected(url: URL, location: str) -> URL:
    """Return the target of a redirect. Raises RefusalError for an invalid one."""
    try:
        return read_url(str(url.join(URL(location))))
    except ValueError:
        raise refuse(422, f"image host {host_of(url)!r} redirects to no URL", "media_redirects", "messages") from None


async def _read_within(response: aiohttp.ClientResponse, max_bytes: int) -> bytes:
    """Read a response up to the limit. Raises RefusalError at the first byte over it."""
    if (response.content_length or 0) > max_bytes:
        raise too_many_bytes(response.content_length or 0, max_bytes)
    data = bytearray()
    async for chunk in response.content.iter_chunked(_CHUNK):
        data += chunk
        if len(data) > max_bytes:
            raise too_many_bytes(len(data), max_bytes)
    return bytes(data)


def too_many_bytes(found: int, max_bytes: int) -> Exception:
    """Return the refusal of an encoded image that is too long."""
    return refuse(
        400,
        f"an image of {found:,} bytes or more; at most {max_bytes:,} (max_image_bytes)",
        "image_too_large",
        "messages",
    )
