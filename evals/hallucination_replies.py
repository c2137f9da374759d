"""What judges of hallucination reply: MMHal-Bench's rating from 0 to 6, Object HalBench's list of objects."""

import json
import re
import unicodedata
from typing import Any

from llava_ray.replies import remove_reasoning

MAX_RATING = 6
_RATING = re.compile(r"\brating\s*[:=]\s*([-+]?\d[\d.,]*)(?<![.,])(\s*/\s*\d+|\s*(?:-|–|to|or)\s*\d+|%)?", re.I)
_MARKS = str.maketrans(dict.fromkeys("*_`#", None))
_LIST = re.compile(r"\[[^\[\]]*\]")
_MAX_READ = 100_000  # characters


def parse_rating(reply: str) -> int | None:
    """Return the only rating by the authors' rule: "rating: N" with a digit from 0 to 6 behind it, in any case."""
    text = reply.lower()
    found = [rating for rating in range(MAX_RATING + 1) if f"rating: {rating}" in text]
    return found[0] if len(found) == 1 else None


def parse_rating_loosely(reply: str) -> int | None:
    """Return the only whole rating from 0 to 6, with Markdown, thoughts and "/6" understood."""
    text = remove_reasoning(reply)
    if text is None:
        return None
    plain = unicodedata.normalize("NFKC", text).translate(_MARKS)
    found = {_to_rating(match[1], (match[2] or "").replace(" ", "")) for match in _RATING.finditer(plain)}
    return found.pop() if len(found) == 1 else None


def _to_rating(number: str, scale: str) -> int | None:
    fits = len(number) == 1 and number.isascii() and number.isdigit() and int(number) <= MAX_RATING
    return int(number) if fits and scale in ("", f"/{MAX_RATING}") else None


def parse_object_list(reply: str) -> list[str] | None:
    """Return the objects by the authors' rule: JSON as a whole, or where it holds '["', its last line."""
    for text in (reply, reply.strip().split("\n")[-1] if '["' in reply else ""):
        found = _read_json(text)
        if found is not _NOTHING:
            return _as_texts(found)
    return None


def parse_object_list_loosely(reply: str) -> list[str] | None:
    """Return the objects of the only list in a reply, wherever it stands; several that differ are none."""
    text = remove_reasoning(reply)
    if text is None or len(text) > _MAX_READ:
        return None
    lists = [_as_texts(_read_json(piece)) for piece in _LIST.findall(text)]
    different = [found for number, found in enumerate(lists) if found not in lists[:number]]
    return different[0] if len(different) == 1 else None


class _Nothing:
    """What is no JSON."""


_NOTHING = _Nothing()


def _read_json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return _NOTHING


def _as_texts(value: Any) -> list[str] | None:
    return value if isinstance(value, list) and all(isinstance(one, str) for one in value) else None
