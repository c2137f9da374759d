"""Fetching of images over http(s), with retries while a host is busy, within limits of time and bytes.

A host that failed for many files in a row is skipped for a while, so that a dead one costs seconds, not days.
"""

import asyncio
import random
import threading
import time
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from typing import Any
from urllib.parse import urlsplit

import fsspec.asyn

from llava_ray.errors import ImageError
from llava_ray.reading import describe_error, short_repr

MAX_BYTES = 1 << 28
_CHUNK = 1 << 16
ONE_TRY_S = 30.0
TOTAL_S = 60.0  # seconds for all attempts and the pauses between them
PAUSES_S = (0.5, 1.5, 4.5)
LONGEST_PAUSE_S = 30.0  # seconds that a host may request by Retry-After
_BUSY = {408, 425, 429}  # HTTP statuses worth a retry, besides 500 and above
_GONE = {404, 410}

# Failures in a row: after the first number each file gets one attempt, after the second the host is mostly skipped.
ONE_TRY_AFTER, LEAVE_AFTER, ASK_EVERY_S = 8, 32, 20.0


class _Busy(Exception):  # noqa: N818 - a state of the host, not an error of ours
    """A failure that a retry may resolve."""

    def __init__(self, what: str, pause_s: float = 0.0) -> None:
        super().__init__(what)
        self.pause_s = pause_s


@dataclass
class _Host:
    """The failures of a host, as seen by this process."""

    num_failed: int = 0
    ask_at: float = 0.0
    last_error: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock)


_HOSTS: dict[str, _Host] = {}


def fetch_image(filesystem: Any, url: str) -> bytes:
    """Fetch the file at a URL with the session of fsspec's ``filesystem``.

    Raises ImageError: ``image_missing`` where the host says that it does not exist, otherwise ``image_unreadable``.
    """
    host = _HOSTS.setdefault(urlsplit(url).netloc, _Host())
    _check_asked(host, url)
    pauses = PAUSES_S if host.num_failed < ONE_TRY_AFTER else ()
    end = time.monotonic() + TOTAL_S
    for pause in (*pauses, None):
        try:
            data = _try(filesystem, url)
        except _Busy as error:
            # Jitter, so that workers which failed together do not retry together.
            wait = max(error.pause_s, (pause or 0.0) * random.uniform(0.8, 1.2))
            if pause is not None and time.monotonic() + wait < end:
                time.sleep(wait)
                continue
            with host.lock:
                host.num_failed, host.last_error = host.num_failed + 1, str(error)
                host.ask_at = time.monotonic() + ASK_EVERY_S
            raise _unreadable(url, f"{error}, {len(pauses) + 1} tries") from error
        except ImageError:
            host.num_failed = 0  # the host answered
            raise
        host.num_failed = 0
        return data
    raise AssertionError


def _check_asked(host: _Host, url: str) -> None:
    """Raise ImageError while a host is being skipped."""
    with host.lock:
        if host.num_failed < LEAVE_AFTER:
            return
        # One caller per interval probes whether the host has recovered; all others fail at once.
        if time.monotonic() >= host.ask_at:
            host.ask_at = time.monotonic() + ASK_EVERY_S
            return
    raise _unreadable(
        url, f"not requested: the last {host.num_failed:,} files of this host failed, with {host.last_error}"
    )


def _try(filesystem: Any, url: str) -> bytes:
    """Make one attempt. Raises ImageError, or _Busy where a retry may help."""
    try:
        return bytes(fsspec.asyn.sync(filesystem.loop, _get, filesystem, url, timeout=ONE_TRY_S + 5))
    except (ImageError, _Busy):
        raise
    except TimeoutError as error:  # fsspec's and asyncio's own are subclasses
        raise _Busy(f"no complete answer within {ONE_TRY_S:g} s") from error
    except ValueError as error:  # raised by aiohttp for an invalid URL
        raise _unreadable(url, f"not a valid URL ({describe_error(error)})") from error
    except Exception as error:  # aiohttp's many kinds of connection errors
        if getattr(error, "status", None):  # too many redirects, an answer that is not HTTP
            raise _unreadable(url, describe_error(error)) from error
        raise _Busy(describe_error(error)) from error


async def _get(filesystem: Any, url: str) -> bytes:
    session = await filesystem.set_session()
    async with asyncio.timeout(ONE_TRY_S), session.get(filesystem.encode_url(url), **filesystem.kwargs) as response:
        _check_status(response.status, response.headers, url)
        if (response.content_length or 0) > MAX_BYTES:
            raise _unreadable(url, f"{response.content_length:,} bytes; expected at most {MAX_BYTES:,}")
        data = bytearray()
        async for chunk in response.content.iter_chunked(_CHUNK):
            data += chunk
            if len(data) > MAX_BYTES:
                raise _unreadable(url, f"more than {MAX_BYTES:,} bytes")
        return bytes(data)


def _check_status(status: int, headers: Any, url: str) -> None:
    if status < 400:
        return
    phrase = next((f" ({known.phrase})" for known in HTTPStatus if known == status), "")
    if status in _BUSY or status >= 500:
        raise _Busy(f"the host answered {status}{phrase}", _asked_pause(headers.get("retry-after")))
    if status in _GONE:
        raise ImageError(
            f"image {short_repr(url)} does not exist: the host answered {status}{phrase}; fix the link, or drop it",
            reason="image_missing",
        )
    raise _unreadable(url, f"the host answered {status}{phrase}")


def _asked_pause(header: str | None) -> float:
    """Parse a Retry-After header, a number of seconds or a date; return bounded seconds."""
    if not header:
        return 0.0
    try:
        seconds = float(header)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(header).timestamp() - time.time()
        except (ValueError, OverflowError):
            return 0.0
    return min(max(0.0, seconds), LONGEST_PAUSE_S) if seconds == seconds else 0.0  # noqa: PLR0124 - NaN


def _unreadable(url: str, what: str) -> ImageError:
    return ImageError(
        f"image {short_repr(url)} cannot be fetched: {what}; fix the link, or remove the record",
        reason="image_unreadable",
    )
