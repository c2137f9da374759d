"""Bounded parsing of untrusted JSON, and a search for the end of values that are too deeply nested to parse."""

import json
import re
from typing import Any

from llava_ray.errors import RecordError
from llava_ray.reading import describe_error

_MAX_DIGITS = 4000  # Python itself refuses to parse longer numbers
_STRUCTURE = re.compile(r'"(?:[^"\\]|\\.)*+"|"|[\[\]{}]', re.DOTALL)  # whole strings, an unterminated one, brackets


def _bounded_int(digits: str) -> Any:
    return int(digits) if len(digits) <= _MAX_DIGITS else digits


def _refused_int(digits: str) -> Any:
    if len(digits) > _MAX_DIGITS:
        raise RecordError(f"a number of {len(digits):,} digits; fix it", reason="malformed")
    return int(digits)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise RecordError(f"the key {twice[:60]!r} occurs twice; expected it once", reason="malformed")
    return values


_SPLITTER = json.JSONDecoder(parse_int=_bounded_int)
_PARSER = json.JSONDecoder(parse_int=_refused_int, object_pairs_hook=_unique)


def find_value(text: str, position: int) -> tuple[Any, int]:
    """Return the value that begins at ``position`` and its end; the value is None if nested too deeply.

    Raises json.JSONDecodeError for invalid or incomplete JSON.
    """
    try:
        return _SPLITTER.raw_decode(text, position)
    except RecursionError:
        return None, _end_of(text, position)


def _end_of(text: str, position: int) -> int:
    depth, place = 0, position
    for match in _STRUCTURE.finditer(text, position):
        if match[0] in "[{":
            depth += 1
        elif match[0] in "]}":
            depth -= 1
        elif match[0] == '"':
            break
        place = match.end()
        if depth == 0:
            return place
    raise json.JSONDecodeError("Expecting the end of a value", text, min(place, len(text)))


def parse_json(text: str | bytes) -> Any:
    """Parse one record's text. Raises RecordError ("malformed")."""
    try:
        decoded = text.decode() if isinstance(text, bytes) else text
    except UnicodeDecodeError as error:
        raise RecordError(
            f"not UTF-8 (byte {error.object[error.start]:#04x} at {error.start:,}); save it as UTF-8",
            reason="malformed",
        ) from error
    try:
        return _PARSER.decode(decoded)
    except RecursionError as error:
        raise RecordError("too many nested lists or objects; fix it", reason="malformed") from error
    except ValueError as error:
        if isinstance(error, RecordError):
            raise
        raise RecordError(
            f"not JSON ({describe_error(error).partition(': ')[2]}; begins {text[:40]!r}); expected one object",
            reason="malformed",
        ) from error
