"""Raw records checked one by one: what can be learnt from becomes a Sample, the rest a RecordError with its reason.

Reasons: ``malformed``, ``no_turns``, ``roles``, ``alternation``, ``empty_answer``, ``image_count``, ``image_missing``,
``image_truncated``, ``image_too_large``, ``image_unreadable``.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from llava_ray.chat.conversation import IMAGE_TOKEN, Turn, join_parts, read_turns
from llava_ray.data.records import CONVERSATION_COLUMNS, RawRecord, Record
from llava_ray.errors import RecordError
from llava_ray.images.reading import check_image, read_bytes

# The types of OpenAI's content parts that stand for an image.
IMAGE_PARTS = ("image", "image_url")


@dataclass(frozen=True)
class Sample:
    """A record whose images are bytes and decode, with their upright (width, height) in pixels."""

    record: Record
    sizes: tuple[tuple[int, int], ...]


def validate(raw: RawRecord, image_folder: str, *, max_pixels: int) -> Sample:
    """Read and check one record; relative image paths start at ``image_folder``.

    Raises RecordError whose message names the record, what was found, what was expected and what to do.
    """
    record = read_record(raw, image_folder)
    return check_images(record, fetch_images(record), max_pixels=max_pixels)


def read_record(raw: RawRecord, image_folder: str) -> Record:
    """Read the turns and the places of the images, opening none of them."""
    with _naming(raw):
        values = _parse(raw.values)
        turns = read_turns(_find_turns(values))
        _check_text(turns)
        images: tuple[bytes | str, ...] = raw.images or tuple(
            _find_image(entry, image_folder) for entry in _list_images(values)
        )
        _check_markers(turns, len(images))
    return Record(raw.id, turns, images, raw.source)


def fetch_images(record: Record) -> tuple[bytes, ...]:
    """Return the encoded images, read from where their paths and URLs lead."""
    with _naming(record):
        return tuple(read_bytes(image) if isinstance(image, str) else image for image in record.images)


def check_images(record: Record, contents: Sequence[bytes], *, max_pixels: int) -> Sample:
    """Decode the record's images, of which ``contents`` holds the bytes."""
    with _naming(record):
        sizes = tuple(
            check_image(content, _image_name(record, index), max_pixels=max_pixels)
            for index, content in enumerate(contents)
        )
    return Sample(replace(record, images=tuple(contents)), sizes)


@contextmanager
def _naming(record: RawRecord | Record) -> Iterator[None]:
    """Put the record's id and place before the message of a RecordError."""
    try:
        yield
    except RecordError as error:
        raise type(error)(f"record {record.id!r} ({record.source}): {error}", reason=error.reason) from error


def _image_name(record: Record, index: int) -> str:
    image = record.images[index]
    return f"image {image!r}" if isinstance(image, str) else f"image {index + 1} of {len(record.images)}"


def _parse(values: bytes | Mapping[str, Any]) -> Mapping[str, Any]:
    if not isinstance(values, bytes):
        return values
    try:
        parsed = json.loads(values)
    except ValueError as error:
        raise RecordError(
            f"not JSON ({error}; begins {values[:40]!r}); expected one object", reason="malformed"
        ) from error
    if not isinstance(parsed, dict):
        raise RecordError(f"found {type(parsed).__name__}; expected an object with `conversations`", reason="malformed")
    return parsed


def _find_turns(values: Mapping[str, Any]) -> list[Any]:
    """Return the list of turns; OpenAI's content parts become text with image markers."""
    turns = next((values[name] for name in CONVERSATION_COLUMNS if values.get(name) is not None), None)
    if isinstance(turns, str):  # Parquet tables often hold them as JSON text
        turns = _parse_turns(turns)
    if not isinstance(turns, list):
        raise RecordError(
            f"no list of turns: `conversations` is {type(turns).__name__}, keys are {', '.join(map(str, values))}; "
            'expected "conversations": [{"from": "human", "value": ...}, {"from": "gpt", "value": ...}]',
            reason="no_turns" if turns is None else "malformed",
        )
    return [_join_parts(turn) for turn in turns]


def _parse_turns(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise RecordError(
            f"`conversations` is text that is not JSON ({error}); expected a list of turns", reason="malformed"
        ) from error


def _join_parts(turn: Any) -> Any:
    parts = turn.get("content") if isinstance(turn, Mapping) else None
    if not isinstance(parts, list):
        return turn
    texts = (None if part.get("type") in IMAGE_PARTS else part.get("text") or "" for part in parts)
    return {**turn, "content": join_parts(texts)}


def _list_images(values: Mapping[str, Any]) -> list[Any]:
    """Return ``image`` or ``images`` as a list, empty for a record of text only."""
    found: Any = next((values[name] for name in ("images", "image") if values.get(name)), [])
    return found if isinstance(found, list) else [found]


def _find_image(entry: Any, image_folder: str) -> bytes | str:
    """Return the bytes of an entry, or the path or URL that leads to them."""
    if isinstance(entry, Mapping):  # how Hugging Face's Image columns lie in Parquet
        entry = entry.get("bytes") or entry.get("path")
    if isinstance(entry, bytes):
        return entry
    if not isinstance(entry, str) or not entry:
        raise RecordError(
            f"an image is given as {type(entry).__name__} ({str(entry)[:40]!r}); "
            "expected a path, bytes, or an object with bytes or path",
            reason="malformed",
        )
    return entry if "://" in entry or entry.startswith("/") else f"{image_folder.rstrip('/')}/{entry}"


def _check_markers(turns: Sequence[Turn], num_images: int) -> None:
    num_markers = sum(turn.value.count(IMAGE_TOKEN) for turn in turns)
    if num_markers != num_images:
        raise RecordError(
            f"{num_markers} {IMAGE_TOKEN} marker(s) in the turns but {num_images} image(s); expected one marker for "
            "each image. Add or remove markers, or list the images that belong to the record",
            reason="image_count",
        )


def _check_text(turns: Sequence[Turn]) -> None:
    for number, turn in enumerate(turns, start=1):
        try:
            turn.value.encode()
        except UnicodeEncodeError as error:
            raise RecordError(
                f"turn {number} holds half of a surrogate pair ({turn.value[error.start : error.end]!r} at character "
                f"{error.start}), which is no text; remove it",
                reason="malformed",
            ) from error
