"""Validation of raw records: a valid one becomes a Sample, any other a RecordError with its reason.

Reasons: ``malformed``, ``unreadable`` (damaged in its file), ``unsupported`` (a key or part that would be lost),
``no_turns``, ``roles``, ``alternation``, ``empty_answer``, ``image_count``, ``image_missing``, ``image_truncated``,
``image_too_large``, ``image_too_costly``, ``image_unreadable``; of preferences also ``no_prompt``, ``equal_sides``,
``image_mismatch``.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from llava_ray.chat.conversation import IMAGE_TOKEN, Turn
from llava_ray.data.json_text import parse_json
from llava_ray.data.preference_records import join_sides, split_preference
from llava_ray.data.record_images import find_record_images
from llava_ray.data.record_keys import check_keys
from llava_ray.data.record_turns import count_markers, read_record_turns
from llava_ray.data.records import Fault, RawRecord, Record
from llava_ray.errors import RecordError
from llava_ray.images.reading import check_image, read_bytes
from llava_ray.reading import short_repr

_MAX_MESSAGE = 2000  # characters


@dataclass(frozen=True)
class Sample:
    """A record whose images are bytes that decode, with their upright (width, height) in pixels."""

    record: Record
    sizes: tuple[tuple[int, int], ...]


def validate(raw: RawRecord, image_folder: str, *, max_pixels: int, pairs: bool = False) -> Sample:
    """Read and check one record; relative image paths are below ``image_folder``.

    Raises RecordError whose message names the record, what was found, what was expected and what to do.
    """
    record = read_record(raw, image_folder, pairs=pairs)
    return check_images(record, fetch_images(record, image_folder), max_pixels=max_pixels)


def read_record(raw: RawRecord, image_folder: str, *, unnamed_images: bool = False, pairs: bool = False) -> Record:
    """Parse the turns and find the images of a record, opening none of them.

    With ``unnamed_images`` a record may have markers for images that it does not name; these are then empty. With
    ``pairs`` it is a preference, whose two sides are read as two records.
    """
    with _naming(raw):
        values = parse_values(raw)
        if not pairs:
            return _read_values(raw, values, image_folder, unnamed_images=unnamed_images)
        sides = split_preference(values)
        chosen = _read_values(raw, sides.chosen, image_folder, unnamed_images=unnamed_images)
        rejected = _read_values(raw, sides.rejected, image_folder, unnamed_images=unnamed_images)
        if chosen.images != rejected.images:
            raise RecordError(
                "chosen and rejected show different images; expected the same prompt and images on both sides",
                reason="image_mismatch",
            )
        turns, worse = join_sides(chosen.turns, rejected.turns, sides)
        return replace(chosen, turns=turns, rejected=worse)


def _read_values(raw: RawRecord, values: Mapping[str, Any], image_folder: str, *, unnamed_images: bool) -> Record:
    """Read one conversation of a record and its images."""
    read = read_record_turns(values)
    _check_text(read.turns)
    images = raw.images or find_record_images(values, read.images, image_folder)
    num_markers = count_markers(read.turns)
    ignored = check_keys(values, read.images, len(images))
    if unnamed_images and not images:
        images = (b"",) * num_markers
    _check_markers(num_markers, len(images))
    return Record(raw.id, read.turns, images, raw.source, tuple(dict.fromkeys([*raw.ignored, *ignored, *read.ignored])))


def fetch_images(record: Record, image_folder: str | None = None) -> tuple[bytes, ...]:
    """Read the encoded images from their paths and URLs.

    Raises RecordError, and DataError where the storage of ``image_folder`` (or any storage, without it) fails.
    """
    with _naming(record):
        return tuple(read_bytes(image, image_folder) if isinstance(image, str) else image for image in record.images)


def check_images(record: Record, contents: Sequence[bytes], *, max_pixels: int) -> Sample:
    """Decode the record's images from their ``contents``, and return the sample."""
    with _naming(record):
        sizes = tuple(
            check_image(content, _image_name(record, index), max_pixels=max_pixels)
            for index, content in enumerate(contents)
        )
    return Sample(replace(record, images=tuple(contents)), sizes)


@contextmanager
def _naming(record: RawRecord | Record) -> Iterator[None]:
    """Prefix the message of a RecordError with the record's id and source, in printable characters."""
    try:
        yield
    except RecordError as error:
        message = f"record {record.id!r} ({record.source}): {error}".encode("utf-8", "backslashreplace").decode()
        message = message if len(message) <= _MAX_MESSAGE else message[:_MAX_MESSAGE] + "…"
        raise type(error)(message, reason=error.reason) from error
    except RecursionError as error:
        message = f"record {record.id!r} ({record.source}): too many nested lists or objects; fix it"
        raise RecordError(message, reason="malformed") from error


def _image_name(record: Record, index: int) -> str:
    image = record.images[index]
    return f"image {short_repr(image)}" if isinstance(image, str) else f"image {index + 1} of {len(record.images)}"


def parse_values(raw: RawRecord) -> Mapping[str, Any]:
    """Parse a record's keys and values. Raises RecordError."""
    values = raw.values
    if isinstance(values, Fault):
        raise RecordError(values.message, reason=values.reason)
    if not isinstance(values, bytes):
        return values
    parsed = parse_json(values)
    if not isinstance(parsed, dict):
        raise RecordError(f"found {type(parsed).__name__}; expected an object with `conversations`", reason="malformed")
    return parsed


def _check_markers(num_markers: int, num_images: int) -> None:
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
                f"turn {number} holds a lone surrogate ({turn.value[error.start : error.end]!r} at character "
                f"{error.start}), which is not valid text; remove it",
                reason="malformed",
            ) from error
