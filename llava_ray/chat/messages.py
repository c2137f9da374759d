"""Separation of a Jinja chat template's output into characters from messages and characters of the template.

A template is a program: it may trim a message, remove its reasoning, or leave it out. So it is run a second time, with
private-use characters in place of each message: where the two outputs differ, and only there, are messages.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jinja2

from llava_ray.errors import RecordError

_Range = tuple[int, int]
_Message = dict[str, Any]

_FIRST_MARK, _NUM_MARKS = 0xF0000, 0xFFFE  # a plane of private-use characters
_MARKED = re.compile(f"([{chr(_FIRST_MARK)}-{chr(_FIRST_MARK + _NUM_MARKS - 1)}])\\1*")


def find_messages(
    text: str,
    messages: Sequence[_Message],
    write: Callable[[list[_Message]], str],
    find_control: Callable[[str], list[_Range]],
) -> list[_Range]:
    """Return the ranges of ``text`` that come from ``messages``; ``text`` is ``write(messages)``.

    White space around a message counts as the template's. With a template that depends on a message's words (one that
    removes reasoning) only the control tokens written out in messages are found, by ``find_control``. Raises
    RecordError ("control_tokens") if it depends on these.
    """
    whole = _locate(text, messages, write, _core)
    if whole is not None:
        return whole
    if not any(find_control(message["content"]) for message in messages):
        return []
    found = _locate(text, messages, write, find_control)
    if found is None:
        raise RecordError(
            "a message holds control tokens written out as text, and the tokenizer's chat template writes messages "
            "with and without them in different ways, so that they cannot be told from the template's own. Take them "
            "out of the message, or choose a template from the table, such as 'chatml_direct'.",
            reason="control_tokens",
        )
    return found


def _core(content: str) -> list[_Range]:
    """Return the range of a message without the surrounding white space, which templates may trim."""
    start = len(content) - len(content.lstrip())
    return [(start, len(content.rstrip()))] if start < len(content) else []


def _locate(
    text: str,
    messages: Sequence[_Message],
    write: Callable[[list[_Message]], str],
    choose: Callable[[str], Iterable[_Range]],
) -> list[_Range] | None:
    """Return the ranges of the marked characters in ``text``; None if the rest of the two texts differs."""
    pieces: list[str] = []
    marked: list[_Message] = []
    for message in messages:
        content, written, place = message["content"], "", 0
        for start, stop in choose(content):
            written += content[place:start] + chr(_FIRST_MARK + len(pieces) % _NUM_MARKS) * (stop - start)
            pieces.append(content[start:stop])
            place = stop
        marked.append({**message, "content": written + content[place:]})
    try:
        other = write(marked)
    except (jinja2.TemplateError, TypeError, ValueError, LookupError):
        return None
    if len(other) != len(text):
        return None
    ranges: list[_Range] = []
    place = 0
    for run in _MARKED.finditer(other):
        start, stop = run.span()
        candidates = pieces[ord(run[1]) - _FIRST_MARK :: _NUM_MARKS]
        if other[place:start] != text[place:start] or text[start:stop] not in candidates:
            return None
        ranges.append((start, stop))
        place = stop
    return ranges if other[place:] == text[place:] else None
