"""Splitting of JSON and JSON lines files, plain or gzipped, in UTF-8 or with another byte order mark, into records.

Records are not validated here: a fault of one (bytes that are not text, deep nesting) is reported when that record is
parsed, so that the others can be used.
"""

import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, islice
from typing import Any, TextIO

from llava_ray.data.json_text import find_value
from llava_ray.errors import DataError
from llava_ray.images.reading import open_filesystem
from llava_ray.reading import describe_error, short_repr

JSON_WINDOW = 1 << 24  # characters
_JSON_GAP = re.compile(r"[\s,]*")
MAX_RECORD = 1 << 28  # characters of one record
_LINES_AHEAD = 200  # searched for the end of a record that spans several lines

_GZIP = b"\x1f\x8b"
_MARKS = {b"\xff\xfe\0\0": "utf-32", b"\0\0\xfe\xff": "utf-32", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}

_MAX_ID = 500  # characters
_SURROGATES = re.compile("[\ud800-\udfff]")
_NO_TEXT = re.compile("[\udc80-\udcff\0]")  # bytes that are not UTF-8 are decoded to these


def read_json_records(path: str) -> Iterator[tuple[int, bytes, str | None]]:
    """Yield row (from 0), JSON text and id of each record of a LLaVA JSON file, with one window of it in memory.

    Raises DataError where the text is not JSON: the start of the next record is then unknown.
    """
    with _open_text(path) as stream:
        for row, (text, value) in enumerate(split_json(stream, path)):
            yield row, _as_bytes(text), _own_id(value)


def read_jsonl(path: str) -> Iterator[tuple[int, bytes, str | None]]:
    """Yield line number (from 1), text and id of each line that is not empty; a line may be invalid JSON.

    Raises DataError for JSON that spans several lines, or is one list.
    """
    with _open_text(path) as stream:
        lines = iter(lambda: stream.readline(MAX_RECORD + 1), "")
        ahead = list(islice(lines, _LINES_AHEAD))
        _check_first_line(path, ahead)
        for number, line in enumerate(chain(ahead, lines), start=1):
            if len(line) > MAX_RECORD:
                raise DataError(f"{path}: line {number} has more than {MAX_RECORD:,} characters; is it JSON lines?")
            stripped = line.strip()
            if stripped:
                yield number, _as_bytes(stripped), _own_id(_parsed_line(stripped))


def _parsed_line(line: str) -> Any:
    """Parse a line; None for invalid JSON, which is rejected later with its line number."""
    try:
        value, end = find_value(line, 0)
    except json.JSONDecodeError:
        return None
    return value if end == len(line) else None


def _check_first_line(path: str, lines: Sequence[str]) -> None:
    """Raise DataError for a file whose first record spans several lines, or that is a list."""
    start = next((number for number, line in enumerate(lines) if line.strip()), len(lines))
    first = lines[start].strip() if start < len(lines) else "{}"
    if first.startswith("[") and _is_all(first, lines[start + 1 :]):
        what = f"begins with a JSON list ({first[:30]!r})"
    elif _parsed_line(first) is None and _starts_value("".join(lines[start:]).lstrip()):
        what = f"its first record is written over several lines (the first is {first[:30]!r})"
    else:
        return
    raise DataError(f"{path}: {what}; expected a record a line (.jsonl). Name the file .json instead")


def _is_all(first: str, others: Sequence[str]) -> bool:
    """Return whether a list on the first line is the whole file or continues below; else it is one bad record."""
    following = next((line.strip() for line in others if line.strip()), None)
    if following is None:
        return True
    if _parsed_line(first) is not None:
        return False
    return _starts_value("\n".join([first, *others])) or not isinstance(_parsed_line(following), dict)


def _starts_value(text: str) -> bool:
    """Return whether a text begins with an object or list that spans several lines."""
    try:
        value, end = find_value(text, 0)
    except json.JSONDecodeError as error:
        # So many lines of one value are not a single damaged line.
        return text.count("\n") + 1 >= _LINES_AHEAD and error.pos >= text.rstrip().rfind("\n")
    return isinstance(value, dict | list) and "\n" in text[:end]


def split_json(stream: TextIO, name: str) -> Iterator[tuple[str, Any]]:
    """Yield text and value of each element of a JSON list, or of values that follow one another."""
    consumed = 0
    window = stream.read(JSON_WINDOW)
    position = _after_gap(window, 0)
    in_list = window[position : position + 1] == "["
    position += in_list
    while True:
        position = _after_gap(window, position)
        if in_list and window[position : position + 1] == "]":
            _check_end(window, position + 1, stream, name)
            return
        try:
            value, end = find_value(window, position)
            if end == len(window) and isinstance(value, int | float) and (more := stream.read(JSON_WINDOW)):
                window += more  # a number may continue beyond the window
                continue
        except json.JSONDecodeError as error:
            # Possibly just cut off by the window: doubling it keeps the total work linear.
            more = stream.read(max(JSON_WINDOW, len(window)))
            if not more and not in_list and position == len(window):
                return
            if not more or len(window) - position > MAX_RECORD:
                raise _not_json(name, window, consumed, error) from error
            consumed += position
            window, position = window[position:] + more, 0
            continue
        yield window[position:end], value
        position = end


def _check_end(window: str, position: int, stream: TextIO, name: str) -> None:
    """Raise DataError if anything but white space follows a list."""
    while window:
        rest = window[position:].strip()
        if rest:
            raise DataError(
                f"{name}: more text follows the end of its list ({rest[:30]!r}); expected one list of records. Join "
                "the lists, or save a record a line (.jsonl)"
            )
        window, position = stream.read(JSON_WINDOW), 0


def _not_json(name: str, window: str, consumed: int, error: json.JSONDecodeError) -> DataError:
    """Build the error that says where a file stops being JSON, and the likely reason."""
    if len(window) > MAX_RECORD:
        return DataError(
            f"{name}: its records are more than {MAX_RECORD:,} characters long; expected a list of records"
        )
    if _NO_TEXT.match(window, error.pos):
        return DataError(f"{name}: not UTF-8 at character {consumed + error.pos:,}; save it as UTF-8")
    return DataError(
        f"{name}: not JSON at character {consumed + error.pos:,} ({error.msg}, at "
        f"{window[error.pos : error.pos + 30]!r}); expected a list of records (or .jsonl, a record a "
        "line). Was the file copied completely?"
    )


@contextmanager
def _open_text(path: str) -> Iterator[TextIO]:
    """Open a file as text; invalid bytes become lone surrogates. Raises DataError."""
    filesystem, place = open_filesystem(path)
    try:
        with filesystem.open(place, "rb") as raw:
            buffered = io.BufferedReader(raw) if not hasattr(raw, "peek") else raw
            stream: Any = gzip.GzipFile(fileobj=buffered) if buffered.peek(2)[:2] == _GZIP else buffered
            head = stream.peek(4)[:4]
            encoding = next((name for mark, name in _MARKS.items() if head.startswith(mark)), "utf-8-sig")
            errors = "surrogateescape" if encoding == "utf-8-sig" else "surrogatepass"
            yield io.TextIOWrapper(stream, encoding=encoding, errors=errors)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path}: the gzip file is damaged ({describe_error(error)}); fetch it again") from error
    except UnicodeError as error:
        raise DataError(
            f"{path}: not text in the encoding of its byte order mark ({describe_error(error)}); save it as UTF-8"
        ) from error
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({describe_error(error)}); check the file and who may read it"
        ) from error


def _as_bytes(text: str) -> bytes:
    """Encode a text as UTF-8 again; lone surrogates become the invalid bytes that they were read from."""
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return text.encode("utf-8", "surrogatepass")


def _after_gap(window: str, position: int) -> int:
    """Return the position of the next value."""
    gap = _JSON_GAP.match(window, position)
    return gap.end() if gap else position


def _own_id(value: object) -> str | None:
    """Return a record's own id as printable text, None where it has none."""
    own = value.get("id") if isinstance(value, dict) else None
    return None if own is None else clean_id(own)


def clean_id(own: object) -> str:
    """Return an id as text that any file or terminal accepts."""
    text = own if isinstance(own, str) else str(own) if isinstance(own, bool | float) else None
    if text is None:
        text = str(own) if isinstance(own, int) and own.bit_length() < 4 * _MAX_ID else short_repr(own)
    text = _SURROGATES.sub(lambda half: f"\\u{ord(half[0]):04x}", text).replace("\0", "\\0")
    return text if len(text) <= _MAX_ID else text[:_MAX_ID] + "…"
