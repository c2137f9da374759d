"""Reading a benchmark's official files: JSON, JSON lines, tab-separated tables, Parquet."""

import csv
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from llava_ray.errors import DataError

_MAX_NAMED = 10
_MAX_CELL_BYTES = 2**30  # tables with images in them
_OTHER_STARTS = {
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
    b"\x1f\x8b": "gzip",
    b"PK": "a zip archive",
    b"PAR1": "Parquet",
}
_ESCAPED = "backslashreplace"  # a lone surrogate of an answer becomes its JSON escape
_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif")


def find(folder: Path, *patterns: str) -> Path:
    """Return the first file that matches one of the patterns. Raises DataError."""
    for pattern in patterns:
        for found in sorted(folder.glob(pattern)):
            return found
    raise DataError(f"{folder} has no {' or '.join(patterns)}; see evals/README.md for what the folder has to hold.")


def find_all(folder: Path, *patterns: str) -> list[Path]:
    """Return all files of the first pattern with matches. Raises DataError."""
    for pattern in patterns:
        if found := sorted(folder.glob(pattern)):
            return found
    raise DataError(f"{folder} has no {' or '.join(patterns)}; see evals/README.md for what the folder has to hold.")


def read_utf8(path: Path) -> str:
    """Read a text file. Raises DataError with the likely encoding if it is not UTF-8."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    try:
        text = content.decode("utf-8-sig")
        if "\0" not in text[:1000]:
            return text
    except UnicodeDecodeError:
        text = ""
    guess = next((name for start, name in _OTHER_STARTS.items() if content.startswith(start)), None)
    guess = guess or ("UTF-16" if b"\0" in content[:1000] else "an older encoding such as Latin-1")
    raise DataError(f"{path} is not UTF-8 (it looks like {guess}): save it as UTF-8.")


def read_json_value(path: Path, remedy: str = "obtain it again") -> Any:
    """Read a JSON file. Raises DataError."""
    try:
        return json.loads(read_utf8(path))
    except (ValueError, RecursionError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path} cannot be read as JSON: {error}; {remedy}.") from error


def read_lines(path: Path) -> list[Any]:
    """Read a file of JSON lines. Raises DataError, which names the line."""
    rows = []
    text = read_utf8(path)
    for number, line in enumerate(text.split("\n"), start=1):  # splitlines() would also split at U+2028 in a text
        if line.strip():
            try:
                rows.append(json.loads(line))
            except (ValueError, RecursionError) as error:
                if not rows and _is_json(text):
                    raise DataError(f"{path} is one JSON value over many lines: write one object a line.") from error
                raise DataError(f"{path}, line {number} is not JSON: {error}; repair or remove it.") from error
    return rows


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def read_table(path: Path) -> Iterator[dict[str, str]]:
    """Yield the rows of a tab-separated file with a header. Raises DataError."""
    csv.field_size_limit(_MAX_CELL_BYTES)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            yield from csv.DictReader(file, delimiter="\t")
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"{path} cannot be read as a tab-separated table: {error}") from error


def read_parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a Parquet file, one row group in memory at a time. Raises DataError."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            for number in range(file.num_row_groups):
                yield from file.read_row_group(number).to_pylist()
    except (OSError, ValueError, pa.ArrowException) as error:  # bytes that are no text are a ValueError
        raise DataError(f"{path} cannot be read as Parquet: {error}; obtain it again.") from error


def need(row: Any, key: str, path: Path) -> Any:
    """Return a required field of a row. Raises DataError, which names the file and the row's fields."""
    if not isinstance(row, dict) or key not in row:
        found = ", ".join(row) if isinstance(row, dict) else type(row).__name__
        raise DataError(f"{path}: a row has no {key!r} (it has {found}); is this the official file?")
    return row[key]


def check_unique(ids: Sequence[str], path: Path, what: str) -> None:
    """Check that ids are unique. Raises DataError."""
    seen: set[str] = set()
    twice = list(dict.fromkeys(name for name in ids if name in seen or seen.add(name)))  # type: ignore[func-returns-value]
    if twice:
        raise DataError(f"{path}: {what} {list_first(twice)} occurs more than once; keep one of each.")


def index_by_id(pairs: Iterable[tuple[str, Any]], path: Path, what: str) -> dict[str, Any]:
    """Return values by id, merging equal duplicates. Raises DataError for different values of an id."""
    found: dict[str, Any] = {}
    differing: dict[str, None] = {}
    for name, value in pairs:
        if found.setdefault(name, value) != value:
            differing[name] = None
    if differing:
        raise DataError(f"{path} has different {what} of {list_first(list(differing))}; keep one of each.")
    return found


def need_text(row: Any, key: str, path: Path) -> str:
    """Return a required text field of a row. Raises DataError."""
    value = need(row, key, path)
    if not isinstance(value, str):
        raise DataError(f"{path}: {key!r} of question {row.get('question_id')!r} is no text but {value!r:.80}.")
    return value


def need_words(row: Any, key: str, name: str, path: Path) -> str:
    """Return a required text of the question ``name``, which is not blank. Raises DataError."""
    value = need(row, key, path)
    if not isinstance(value, str) or not value.strip():
        raise DataError(
            f"{path}: {key!r} of question {name!r} is {value!r:.80}; expected a text. Obtain the file again."
        )
    return value


def list_first(names: Sequence[str]) -> str:
    """Format the first ids of a list."""
    return ", ".join(map(repr, names[:_MAX_NAMED])) + (
        f" and {len(names) - _MAX_NAMED:,} more" * (len(names) > _MAX_NAMED)
    )


def check_complete(missing: Sequence[str], num: int, lacking: str, instead: str) -> None:
    """Check that a joined file has all ids; a subset would be a different benchmark. Raises DataError."""
    if missing:
        listed = ", ".join(missing[:_MAX_NAMED]) + (", …" if len(missing) > _MAX_NAMED else "")
        raise DataError(
            f"{lacking} for {len(missing):,} of {num:,} questions: {listed}; add it, or leave {instead} out."
        )


def picture(cell: Any, path: Path) -> bytes:
    """Return the encoded image of a Parquet cell in the hub's form, ``{"bytes": …}``. Raises DataError."""
    if isinstance(cell, bytes):
        return cell
    content = need(cell, "bytes", path)
    if not isinstance(content, bytes):
        raise DataError(f"{path}: an image cell holds no bytes; obtain the Parquet file with embedded images.")
    return content


def without_pictures(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row without its cells that hold bytes, for a JSON file."""
    return {
        key: value
        for key, value in row.items()
        if not any(isinstance(part, bytes) for part in (value.values() if isinstance(value, dict) else (value,)))
    }


def hash_files(folder: Path) -> str:
    """Hash the names and sizes of a folder's files, without images, to 16 hex digits."""
    others = (file for file in folder.rglob("*") if file.suffix.lower() not in _IMAGE_SUFFIXES and file.is_file())
    listed = sorted((str(file.relative_to(folder)), file.stat().st_size) for file in others)
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()[:16]


def as_json(value: Any) -> bytes:
    """Format a value as the bytes of a JSON file."""
    return json.dumps(value, ensure_ascii=False, indent=1).encode(errors=_ESCAPED)


def as_lines(rows: list[Any]) -> bytes:
    """Format rows as the bytes of a file of JSON lines."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode(errors=_ESCAPED)
