"""Incremental reading of one call, written as a JSON object, with its arguments passed on as they come."""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any

_ARGS_MARK = "[ARGS]"
_KEYS = ("arguments", "parameters")
_MAX_NAME = 256


class CallScanner:
    """Reads ``{"name": …, "arguments": {…}}``, or ``name[ARGS]{…}``, character by character."""

    def __init__(self, arguments_key: str) -> None:
        """Initialise; ``arguments_key`` is the format's key, beside which the usual ones are read too."""
        self.keys = {arguments_key, *_KEYS}
        self.name = ""
        self.begun = False
        """Whether the call has a known name and arguments, so that it is one."""
        self.is_complete = False
        self._text = ""
        self._place = 0
        self._depth = 0
        self._in_string = False
        self._escaped = False
        self._string_start = 0
        self._key: str | None = None
        self._expects_key = False
        self._arguments: list[int] | None = None  # where they begin, and end
        self._told = 0
        self._has_told_name = False
        self._bare = False  # name[ARGS]{…}

    def push(self, text: str, names: Collection[str]) -> tuple[int, bool | None]:
        """Read more text; return how many characters are the call's, and False if it is none of these functions."""
        self._text += text
        before = self._place
        if self._place == 0 and not self._text.startswith("{") and not self._bare:
            end = self._text.find("{", 0, _MAX_NAME)
            if self._read_bare_name(end, names) is False:
                return end if end >= 0 else _MAX_NAME, False
            if not self._bare:  # the name is not whole: it is pushed again
                self._text = ""
                return 0, None
        while self._place < len(self._text) and not self.is_complete:
            self._read(self._text[self._place])
            self._place += 1
            if self.name and self.name not in names:
                return self._place - before, False
            self.begun = self.begun or (bool(self.name) and self._arguments is not None)
        if self.is_complete and not self._finish():
            return self._place - before, False
        return self._place - before, None

    def take(self) -> tuple[str, str]:
        """Return the name, once, and the arguments that were not taken yet."""
        name = "" if self._has_told_name else self.name
        self._has_told_name = True
        if self._arguments is None:
            return name, ""
        end = self._arguments[1] if len(self._arguments) > 1 else self._place
        start = max(self._told, self._arguments[0])
        self._told = end
        return name, self._text[start:end]

    def _read_bare_name(self, end: int, names: Collection[str]) -> bool | None:
        """Read the name before bare arguments, which begin at ``end``; return False for an unknown one."""
        if end < 0:
            return False if len(self._text) > _MAX_NAME else None
        name = self._text[:end].strip().removesuffix(_ARGS_MARK).strip()
        if name not in names:
            return False
        self.name, self._bare, self._place = name, True, end
        self._arguments = [end]
        return None

    def _read(self, character: str) -> None:
        if self._in_string:
            self._read_in_string(character)
        elif character == '"':
            self._in_string, self._string_start = True, self._place
        elif character in "{[":
            if self._depth == 1 and self._key in self.keys and character == "{" and self._arguments is None:
                self._arguments = [self._place]
            self._depth += 1
            self._expects_key = character == "{" and self._depth == 1
        elif character in "}]":
            self._depth -= 1
            self._close()
        elif character == "," and self._depth == 1:
            self._expects_key, self._key = True, None

    def _read_in_string(self, character: str) -> None:
        if self._escaped:
            self._escaped = False
        elif character == "\\":
            self._escaped = True
        elif character == '"':
            self._in_string = False
            if self._depth == 1 and not self._bare:
                self._take_string(self._text[self._string_start : self._place + 1])

    def _take_string(self, quoted: str) -> None:
        try:
            value = json.loads(quoted)
        except ValueError:
            return
        if self._expects_key:
            self._key, self._expects_key = value, False
        elif self._key == "name" and not self.begun:
            self.name = value

    def _close(self) -> None:
        inner = 0 if self._bare else 1
        if self._depth == inner and self._arguments is not None and len(self._arguments) == 1:
            self._arguments.append(self._place + 1)
        if self._depth == 0:
            self.is_complete = True

    def _finish(self) -> bool:
        """Check the whole call; find what was not found as it came. Return whether it is one."""
        if self.begun:  # pieces of it may have been passed on: as with OpenAI, arguments may be no JSON
            return True
        value = _read_object(self._text[: self._place])
        if value is None or not self.name:
            return False
        given: Any = next((value[key] for key in self.keys if key in value), {})
        if isinstance(given, str):  # some models write the arguments as a text
            given = _read_object(given)
        if not isinstance(given, dict):
            return False
        self._text = self._text[: self._place] + json.dumps(given, ensure_ascii=False)
        self._arguments = [self._place, len(self._text)]
        self.begun = True
        return True


def _read_object(text: str) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
