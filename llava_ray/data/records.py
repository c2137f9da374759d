"""Raw records and their file formats: LLaVA's JSON, JSON lines, Parquet tables and WebDataset tars."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from llava_ray.chat.conversation import Turn
from llava_ray.errors import DataError
from llava_ray.images.reading import open_filesystem
from llava_ray.invocation import command

# Formats by file extension.
_FORMATS = {
    ".json": "json",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json.gz": "json",
    ".jsonl.gz": "jsonl",
    ".ndjson.gz": "jsonl",
    ".parquet": "parquet",
    ".tar": "tar",
    ".tar.gz": "tar",
    ".tgz": "tar",
}

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".jp2", ".avif", ".ppm"}

# Files that save_to_disk of the `datasets` library writes beside its Arrow files.
_SAVED_FILES = {"dataset_info.json", "state.json", "dataset_dict.json"}


@dataclass(frozen=True)
class Record:
    """One sample: its turns and its images."""

    id: str
    turns: tuple[Turn, ...]
    images: tuple[bytes | str, ...]
    """Encoded image files, or paths and URLs that are not read yet."""
    source: str
    """file:row, for messages. Rows count from 0, lines of a .jsonl file from 1."""
    ignored: tuple[str, ...] = ()
    """Ignored keys."""
    rejected: tuple[Turn, ...] = ()
    """Of a preference: the rejected answer, to the same question as the chosen one, which ``turns`` end with."""


@dataclass(frozen=True)
class Fault:
    """The reason why a record cannot be read from its file."""

    message: str
    reason: str = "unreadable"
    of_group: bool = False
    """Whether the following rows of the same row group cannot be read either."""


@dataclass(frozen=True)
class RawRecord:
    """One record as stored in its file, not yet validated."""

    id: str
    source: str
    values: bytes | Mapping[str, Any] | Fault
    """JSON text, or columns by name."""
    images: tuple[bytes, ...] = ()
    """Images stored beside the record; they replace any that it names."""
    ignored: tuple[str, ...] = ()
    """Columns of its table, and files beside it, that are not read."""


def find_files(data_path: str) -> tuple[str, list[str]]:
    """Find the format and the sorted files of a path, URL, folder or pattern with ``*``.

    Raises DataError where there are none, where the format is unknown, or where formats are mixed.
    """
    filesystem, place = open_filesystem(data_path)
    if "*" in place:
        found = filesystem.glob(place)
    elif filesystem.isdir(place):
        found = filesystem.ls(place, detail=False)
    else:
        found = [place] if filesystem.exists(place) else []
    if not found:
        raise DataError(f"data_path {data_path!r} does not exist; give a file, a folder or a pattern with *")
    if len(found) > 1:
        found = _without_traces(data_path, found)
    known = {path: kind for path in sorted(map(str, found)) if (kind := _format(path))}
    if not known:
        name = PurePosixPath(str(found[0])).name
        hint = " (Arrow files of `datasets`: write them with to_parquet())" if name.endswith(".arrow") else ""
        raise DataError(
            f"data_path {data_path!r}: {name!r} is of no known format{hint}; "
            f"expected files ending in {', '.join(_FORMATS)}, or a folder that {command('prepare')} wrote"
        )
    kinds = sorted(set(known.values()))
    if len(kinds) > 1:
        raise DataError(f"data_path {data_path!r} mixes {' and '.join(kinds)} files; name one kind, e.g. '*.parquet'")
    return kinds[0], [_unresolved(data_path, filesystem, path) for path in known]


def _without_traces(data_path: str, found: list[Any]) -> list[Any]:
    """Drop hidden and auxiliary files. Raises DataError for a folder of Arrow files."""
    names = {path: PurePosixPath(str(path)).name for path in found}
    data_files = [path for path, name in names.items() if not name.startswith(".") and name not in _SAVED_FILES]
    if "dataset_dict.json" in names.values() or any(name.endswith(".arrow") for name in names.values()):
        raise DataError(
            f"data_path {data_path!r}: an Arrow folder written by save_to_disk of `datasets`; write it as Parquet: "
            "datasets.load_from_disk(folder).to_parquet('data.parquet'), each of its splits by itself"
        )
    return data_files or found


def _format(path: str) -> str | None:
    return next((kind for suffix, kind in _FORMATS.items() if path.lower().endswith(suffix)), None)


def _unresolved(data_path: str, filesystem: Any, place: str) -> str:
    return str(filesystem.unstrip_protocol(place)) if "://" in data_path else place
