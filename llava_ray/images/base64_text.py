"""Decoding of images stored as base64 text, bare or as a data URI."""

import base64
import binascii
import re
from urllib.parse import unquote_to_bytes

from llava_ray.errors import ImageError
from llava_ray.images.containers import identify_format
from llava_ray.reading import short_repr

_DATA_URI = re.compile(r'\s*data:((?:"[^"]{0,500}"|[^",]){0,1000}),', re.IGNORECASE)
# The first base64 characters of image files: PNG, JPEG, GIF, RIFF, TIFF, BMP, JPEG 2000 and AVIF.
_BEGINNINGS = ("iVBORw0KGgo", "/9j/", "R0lGOD", "UklGR", "SUkqA", "TU0AK", "Qk", "AAAADGpQ", "AAAA")
_ALPHABET = re.compile(r"[A-Za-z0-9+/_-]+={0,2}\Z")
_LEAST_CHARS = 40  # the smallest image has more
_SURE_CHARS = 256  # longer than any file name, so not a path


def decode_image_text(text: str) -> bytes | None:
    """Decode an image in base64 text; None for a text that is a path or URL.

    Raises ImageError ("image_unreadable") for a data URI or base64 that is damaged.
    """
    if text[:20].lstrip()[:5].lower() == "data:":
        return decode_record_uri(text)
    compact = "".join(text.split())
    if len(compact) < _LEAST_CHARS or not compact.startswith(_BEGINNINGS) or not _ALPHABET.match(compact):
        return None
    try:
        data = decode_base64(compact)
    except ImageError:
        if len(compact) <= _SURE_CHARS:
            return None
        raise
    return data if identify_format(data) or len(compact) > _SURE_CHARS * 4 else None


def decode_record_uri(text: str) -> bytes:
    """Decode ``data:…;base64,…``. Raises ImageError."""
    head = _DATA_URI.match(text[:2000])
    if head is None or "base64" not in (part.strip().lower() for part in head[1].split(";")):
        raise ImageError(
            f"an image is given as {short_repr(text[:60])}: expected data:image/png;base64,…", reason="image_unreadable"
        )
    payload = text[head.end() :]
    if "%" in payload:
        payload = unquote_to_bytes(payload).decode("latin-1")
    return decode_base64("".join(payload.split()))


def decode_base64(text: str) -> bytes:
    """Decode either alphabet, with or without padding. Raises ImageError."""
    digits = text.rstrip("=").replace("-", "+").replace("_", "/")
    try:
        return base64.b64decode(digits + "=" * (-len(digits) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ImageError(
            f"an image is given as {len(text):,} characters of text that are not valid base64 ({error}; begins "
            f"{short_repr(text[:40])}); expected a path, or base64 of the file",
            reason="image_unreadable",
        ) from error
