"""Images in data URIs: RFC 2397, and common deviations of clients."""

import base64
import re

import numpy as np

from llava_ray.deployments.media.fetching import too_many_bytes
from llava_ray.deployments.refusal import RefusalError, refuse

_HEAD_CHARS = 1000  # of a type and its parameters
# data:, a type and parameters (whose quoted values may hold commas), a comma.
_HEAD = re.compile(r'\s*data:((?:"[^"]*"|[^",])*),', re.IGNORECASE)

_WHITESPACE = b" \t\r\n\f\v"
_ESCAPED_WHITESPACE = re.compile("%(?:20|09|0[abcd])", re.IGNORECASE)
_PLAIN_ALPHABET = bytes.maketrans(b"-_", b"+/")
_FOREIGN = re.compile(rb"[^A-Za-z0-9+/]")
_SLICE = 2**20  # characters
_NOT_HEX = 255
_HEX_VALUES = np.full(256, _NOT_HEX, np.uint8)
for _digit in b"0123456789abcdefABCDEF":
    _HEX_VALUES[_digit] = int(chr(_digit), 16)


def decode_data_uri(place: str, max_bytes: int) -> bytes:
    """Decode ``data:…;base64,…``. Raises RefusalError, for too long data before decoding.

    Line breaks and spaces, the URL-safe alphabet, missing padding and percent-encoding are accepted; the media type is
    ignored, since the format is detected from the bytes.
    """
    head = _HEAD.match(place, 0, _HEAD_CHARS)
    if head is None:
        raise _damaged(f"no comma in its first {_HEAD_CHARS:,} characters; expected data:image/png;base64,…")
    if "base64" not in (parameter.strip().lower() for parameter in head[1].split(";")):
        raise _damaged("it is not base64; expected data:image/png;base64,…")
    start = head.end()
    _check_size(place, start, max_bytes)
    try:
        payload = place[start:].encode("ascii")
    except UnicodeEncodeError as error:
        raise _damaged(f"its base64 holds {place[start + error.start]!a} at character {error.start + 1:,}") from None
    if b"%" in payload:
        payload = _without_escapes(payload)
    return _decoded(payload.translate(_PLAIN_ALPHABET, _WHITESPACE), max_bytes)


def _check_size(place: str, start: int, max_bytes: int) -> None:
    """Check the length of the data from ``start`` on, without copying it. Raises RefusalError."""
    num_chars = len(place) - start - 2 * place.count("%", start)
    if num_chars // 4 * 3 <= max_bytes + 3:
        return
    num_chars -= sum(place.count(chr(blank), start) for blank in _WHITESPACE)
    if "%" in place:
        num_chars -= sum(1 for _ in _ESCAPED_WHITESPACE.finditer(place, start))
    if num_chars // 4 * 3 > max_bytes + 3:
        raise too_many_bytes(num_chars // 4 * 3, max_bytes)


def _without_escapes(payload: bytes) -> bytes:
    """Decode percent-encoded characters, a slice at a time. Raises RefusalError."""
    found, start = bytearray(), 0
    while start < len(payload):
        end = start + _SLICE
        cut = payload.rfind(b"%", end - 2, end)  # an escape that would be cut in two
        end = end if cut < 0 else cut + 3
        found += _slice_without_escapes(payload[start:end], start)
        start = end
    return bytes(found)


def _slice_without_escapes(payload: bytes, start: int) -> bytes:
    """Decode the escapes of a slice, vectorised, since there may be many."""
    chars = np.frombuffer(payload, np.uint8)
    places = np.flatnonzero(chars == ord("%"))
    padded = np.concatenate([chars, np.zeros(2, np.uint8)])
    high, low = _HEX_VALUES[padded[places + 1]], _HEX_VALUES[padded[places + 2]]
    wrong = np.flatnonzero((high == _NOT_HEX) | (low == _NOT_HEX))
    if len(wrong):
        place = start + int(places[wrong[0]]) + 1
        raise _damaged(f"its base64 holds a percent sign without two hexadecimal digits at character {place:,}")
    decoded, is_kept = chars.copy(), np.ones(len(chars), bool)
    decoded[places] = high * 16 + low
    is_kept[places + 1] = is_kept[places + 2] = False
    return decoded[is_kept].tobytes()


def _decoded(payload: bytes, max_bytes: int) -> bytes:
    """Decode base64 in the standard alphabet, without whitespace. Raises RefusalError."""
    digits = payload.rstrip(b"=")
    foreign = _FOREIGN.search(digits)
    if foreign is not None:
        char = chr(foreign[0][0])
        what = "padding (=) before its end" if char == "=" else f"{char!a}"
        raise _damaged(f"its base64 holds {what} at character {foreign.start() + 1:,} (spaces not counted)")
    if len(payload) - len(digits) > 2:
        raise _damaged(f"its base64 ends with {len(payload) - len(digits)} padding characters (=); expected at most 2")
    if len(digits) % 4 == 1:
        raise _damaged(f"its base64 is cut off: {len(digits):,} characters are no whole number of bytes")
    data = base64.b64decode(digits + b"=" * (-len(digits) % 4))
    if len(data) > max_bytes:
        raise too_many_bytes(len(data), max_bytes)
    return data


def _damaged(what: str) -> RefusalError:
    """Return the error for an invalid data URI."""
    return refuse(400, f"a data: URI cannot be read: {what}", "media_data_uri", "messages")
