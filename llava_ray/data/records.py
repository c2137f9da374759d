"""Records as people keep them: LLaVA's JSON, JSON lines, Parquet tables and WebDataset tars, read one by one."""

import io
import json
import re
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import PurePosixPath
from typing import Any, TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from llava_ray.chat.conversation import Turn
from llava_ray.errors import DataError
from llava_ray.images.reading import open_filesystem

# What a file's name says it holds.
FORMATS = {
    ".json": "json",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".tar": "tar",
    ".tar.gz": "tar",
    ".tgz": "tar",
}

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".jp2", ".avif", ".ppm"}

# Columns of a Parquet table that are read; any others stay unread.
COLUMNS = ("id", "image", "images", "conversations", "messages")
CONVERSATION_COLUMNS = ("conversations", "messages")

JSON_WINDOW = 1 << 24  # characters
JSON_GAP = re.compile(r"[\s,]*")


@dataclass(frozen=True)
class Record:
    """One sample: what was said, about which images."""

    id: str
    turns: tuple[Turn, ...]
    images: tuple[bytes | str, ...]
    """Encoded files, or paths and URLs still to be read."""
    source: str
    """file:row, for messages. Rows count from 0, lines of a .jsonl file from 1."""


@dataclass(frozen=True)
class RawRecord:
    """One record as it was found, not yet checked."""

    id: str
    source: str
    values: bytes | Mapping[str, Any]
    """JSON text, or columns by name."""
    images: tuple[bytes, ...] = ()
    """Images that lie beside the record; they take the place of any that it names."""


def find_files(data_path: str) -> tuple[str, list[str]]:
    """Return the format and the sorted files of a path, URL, folder or pattern with ``*``.

    Raises DataError where there is nothing, where the format is unknown, or where formats are mixed.
    """
    filesystem, place = open_filesystem(data_path)
    if "*" in place:
        found = filesystem.glob(place)
    elif filesystem.isdir(place):
        found = filesystem.ls(place, detail=False)
    else:
        found = [place] if filesystem.exists(place) else []
    if not found:
        raise DataError(f"data_path {data_path!r}: nothing is there; give a file, a folder or a pattern with *")
    known = {path: kind for path in sorted(map(str, found)) if (kind := _format(path))}
    if not known:
        raise DataError(
            f"data_path {data_path!r}: {PurePosixPath(str(found[0])).name!r} is of no known format; "
            f"expected files ending in {', '.join(FORMATS)}, or a folder that prepare.py wrote"
        )
    kinds = sorted(set(known.values()))
    if len(kinds) > 1:
        raise DataError(f"data_path {data_path!r} mixes {' and '.join(kinds)} files; name one kind, e.g. '*.parquet'")
    return kinds[0], [_unresolved(data_path, filesystem, path) for path in known]


def _format(path: str) -> str | None:
    return next((kind for suffix, kind in FORMATS.items() if path.lower().endswith(suffix)), None)


def _unresolved(data_path: str, filesystem: Any, place: str) -> str:
    return str(filesystem.unstrip_protocol(place)) if "://" in data_path else place


def read_json(path: str) -> Iterator[tuple[int, bytes, str | None]]:
    """Yield row (from 0), JSON text and id of each record of a LLaVA JSON file, holding one window of it at a time.

    Raises DataError where the text is no JSON: where the next record begins is then anybody's guess.
    """
    with _open_text(path) as stream:
        for row, (text, value) in enumerate(split_json(stream, path)):
            yield row, text.encode(), _own_id(value)


def read_jsonl(path: str) -> Iterator[tuple[int, bytes, str | None]]:
    """Yield line number (from 1), text and id of each line that is not empty; a line may hold no valid JSON."""
    with _open_text(path) as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except json.JSONDecodeError:
                value = None  # kept, to be rejected with its line number
            yield number, line.strip().encode(), _own_id(value)


def split_json(stream: TextIO, name: str) -> Iterator[tuple[str, Any]]:
    """Yield text and value of each element of a JSON list, or of values that follow one another."""
    decoder, consumed = json.JSONDecoder(), 0
    window = stream.read(JSON_WINDOW)
    position = _after_gap(window, 0)
    in_list = window[position : position + 1] == "["
    position += in_list
    while True:
        position = _after_gap(window, position)
        if in_list and window[position : position + 1] == "]":
            return
        try:
            value, end = decoder.raw_decode(window, position)
        except json.JSONDecodeError as error:
            # Perhaps only cut off by the window: reading as much again keeps the total work linear.
            more = stream.read(max(JSON_WINDOW, len(window)))
            if not more and not in_list and position == len(window):
                return
            if not more:
                raise DataError(
                    f"{name}: not JSON at character {consumed + error.pos:,} ({error.msg}, at "
                    f"{window[error.pos : error.pos + 30]!r}); expected a list of records (or .jsonl, a record a "
                    "line). Was the file copied completely?"
                ) from error
            consumed += position
            window, position = window[position:] + more, 0
            continue
        yield window[position:end], value
        position = end


def parquet_layout(path: str) -> tuple[list[int], list[str | None]]:
    """Return the number of rows of each row group, and every row's own id.

    Raises DataError for a file that is no Parquet table or holds no conversations.
    """
    with _open_parquet(path) as file:
        names = file.schema_arrow.names
        if not set(CONVERSATION_COLUMNS) & set(names):
            raise DataError(
                f"{path}: no column {' or '.join(map(repr, CONVERSATION_COLUMNS))}; found {', '.join(names)}. "
                "Rename the column that holds the turns"
            )
        groups = [file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)]
        ids = file.read(["id"])["id"].to_pylist() if "id" in names else [None] * sum(groups)
    return groups, [None if value is None else str(value) for value in ids]


def read_parquet(path: str, row_groups: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Yield the rows of some row groups, columns by name; see COLUMNS."""
    with _open_parquet(path) as file:
        columns = [name for name in COLUMNS if name in file.schema_arrow.names]
        for batch in file.iter_batches(64, row_groups=list(row_groups), columns=columns, use_threads=False):
            yield from batch.to_pylist()


def read_tar(path: str) -> Iterator[tuple[str, bytes, tuple[bytes, ...]]]:
    """Yield key, JSON text and images of each sample of a WebDataset tar: neighbouring files with one base name.

    Images come in the order of the tar. Raises DataError for a damaged tar.
    """
    for key, files in groupby(_tar_files(path), key=lambda file: file[0]):
        text, images = b"", []
        for _, suffix, content in files:
            if suffix == ".json":
                text = content
            else:
                images.append(content)
        yield key, text, tuple(images)


def _tar_files(path: str) -> Iterator[tuple[str, str, bytes]]:
    """Yield key, suffix and content of a tar's JSON and image files; anything else is passed over."""
    filesystem, place = open_filesystem(path)
    key = ""
    try:
        with filesystem.open(place, "rb") as raw, tarfile.open(fileobj=raw, mode="r|*") as tar:
            for member in tar:
                name = PurePosixPath(member.name)
                key, suffix = str(name.parent / name.name.partition(".")[0]), name.suffix.lower()
                if member.isfile() and (suffix == ".json" or suffix in IMAGE_SUFFIXES):
                    content = tar.extractfile(member)
                    yield key, suffix, content.read() if content else b""
    except tarfile.TarError as error:
        raise DataError(f"{path}: the tar is damaged after {key!r} ({error}); fetch it again") from error


@contextmanager
def _open_text(path: str) -> Iterator[TextIO]:
    filesystem, place = open_filesystem(path)
    with filesystem.open(place, "rb") as raw:
        try:
            yield io.TextIOWrapper(raw, encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: not UTF-8 ({error}); save it as UTF-8") from error


@contextmanager
def _open_parquet(path: str) -> Iterator[pq.ParquetFile]:
    filesystem, place = open_filesystem(path)
    try:
        with pq.ParquetFile(place, filesystem=filesystem) as file:
            yield file
    except pa.ArrowInvalid as error:
        raise DataError(f"{path}: not a whole Parquet file ({error}); fetch it again") from error


def _after_gap(window: str, position: int) -> int:
    gap = JSON_GAP.match(window, position)
    return gap.end() if gap else position


def _own_id(value: object) -> str | None:
    own = value.get("id") if isinstance(value, dict) else None
    return None if own is None else str(own)
