"""The images of a record: bytes, base64, paths and URLs, under any of the usual keys."""

from collections.abc import Mapping, Sequence
from typing import Any

from llava_ray.data.record_keys import IMAGE_KEYS, is_absent
from llava_ray.errors import RecordError
from llava_ray.images.base64_text import decode_base64, decode_image_text, decode_record_uri
from llava_ray.reading import short_repr

_MAX_IMAGES = 65_535  # of one record: the feature cache numbers them with 16 bits


def find_record_images(
    values: Mapping[str, Any], of_parts: Sequence[Any], image_folder: str
) -> tuple[bytes | str, ...]:
    """Find the images that a record names, in the order of their markers. Raises RecordError."""
    listed = _list_images(values)
    named = [part for part in of_parts if part is not None]
    if named and len(named) < len(of_parts):
        raise RecordError(
            f"{len(named)} of {len(of_parts)} image parts name their image; expected all of them, or none and `images`",
            reason="malformed",
        )
    if named and listed and named != listed:
        raise RecordError(
            "content parts and the record's own list name different images; expected one of them",
            reason="malformed",
        )
    entries = named or listed
    if len(entries) > _MAX_IMAGES:
        raise RecordError(f"{len(entries):,} images; expected at most {_MAX_IMAGES:,}", reason="image_count")
    return tuple(_find_image(entry, image_folder) for entry in entries)


def _list_images(values: Mapping[str, Any]) -> list[Any]:
    """Return ``image`` or ``images`` as a list, empty for a record of text only."""
    found = [values[name] for name in IMAGE_KEYS if not _is_nothing(values.get(name))]
    lists = [entry if isinstance(entry, list) else [entry] for entry in found]
    if len(lists) > 1 and lists[0] != lists[1]:
        raise RecordError("`image` and `images` name different images; expected one of them", reason="malformed")
    return lists[0] if lists else []


def _is_nothing(value: Any) -> bool:
    return value is None or value is False or (isinstance(value, str | list | bytes) and not value)


def _find_image(entry: Any, image_folder: str) -> bytes | str:
    """Return the bytes of an entry, or their path or URL. Raises RecordError."""
    source = entry
    if isinstance(entry, Mapping):  # Hugging Face's Image columns in Parquet
        encoded = entry.get("bytes")
        if isinstance(encoded, str) and not is_absent(encoded):
            is_uri = encoded[:20].lstrip()[:5].lower() == "data:"
            return decode_record_uri(encoded) if is_uri else decode_base64("".join(encoded.split()))
        source = next((entry[name] for name in ("bytes", "path", "url") if not is_absent(entry.get(name))), None)
    if isinstance(source, bytes) and source:
        return source
    if not isinstance(source, str) or not source:
        raise RecordError(
            f"an image is given as {type(source).__name__} ({short_repr(source)[:60]}); "
            "expected a path, bytes, or an object with bytes or path",
            reason="malformed",
        )
    data = decode_image_text(source)
    if data is not None:
        return data
    return source if "://" in source or source.startswith("/") else f"{image_folder.rstrip('/')}/{source}"
