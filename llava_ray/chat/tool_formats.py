"""The formats in which models write calls of tools, and a reader of them that takes an answer piece by piece.

| name | an answer with two calls |
| --- | --- |
| hermes | ``<tool_call>{"name": "f", "arguments": {…}}</tool_call><tool_call>…</tool_call>`` |
| llama_json | ``{"name": "f", "parameters": {…}}; {"name": …}``, also behind ``<|python_tag|>`` |
| mistral | ``[TOOL_CALLS][{"name": "f", "arguments": {…}}, {…}]``, also ``[TOOL_CALLS]f[ARGS]{…}`` |
| pythonic | ``[f(x=1), g(y="z")]`` |
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from llava_ray.chat.pythonic_calls import read_pythonic
from llava_ray.chat.tool_scanning import CallScanner


@dataclass(frozen=True)
class ToolFormat:
    """The form in which one family of models writes calls."""

    name: str
    start: str = ""
    """The text before calls; without one, an answer that begins like a call is one."""
    optional_start: str = ""
    """A text that may stand before calls that need none."""
    end: str = ""
    """The text behind each call."""
    opening: str = ""
    """The text between ``start`` and the first call."""
    closing: str = ""
    """The text behind the last call."""
    separator: str = ""
    """The text between two calls; with ``end`` each call has its own ``start``."""
    arguments: str = "arguments"
    """The key of the arguments."""


TOOL_FORMATS = {
    one.name: one
    for one in (
        ToolFormat("hermes", start="<tool_call>", end="</tool_call>"),
        ToolFormat("llama_json", optional_start="<|python_tag|>", separator="; ", arguments="parameters"),
        ToolFormat("mistral", start="[TOOL_CALLS]", opening="[", closing="]", separator=", "),
        ToolFormat("pythonic", opening="[", closing="]", separator=", "),
    )
}
_BETWEEN = " \t\r\n,;"  # what may stand between calls


@dataclass(frozen=True)
class CallDelta:
    """The next piece of a call: its name with the first, and more of the JSON text of its arguments."""

    index: int
    name: str = ""
    arguments: str = ""


@dataclass(frozen=True)
class AnswerDelta:
    """The next piece of an answer: text that is no call, and pieces of calls."""

    text: str = ""
    calls: tuple[CallDelta, ...] = ()


class CallReader:
    """Separates the calls of one answer from its text. A call of an unknown function, or a broken one, stays text."""

    def __init__(self, tool_format: ToolFormat, names: Collection[str], *, most: int | None = None) -> None:
        """Initialise for the functions with these ``names``; calls beyond ``most`` are left out."""
        self.format = tool_format
        self.names = frozenset(names)
        self.most = most
        self.num_calls = 0
        self._buffer = ""
        self._begun = False  # whether anything but white space was text
        self._raw = ""  # the text since the start of calls that may turn out to be none
        self._scanner: CallScanner | None = None
        self._in_calls = False

    def push(self, text: str) -> AnswerDelta:
        """Take more text of the answer; return what is certain now."""
        self._buffer += text
        return self._read(last=False)

    def finish(self) -> AnswerDelta:
        """Return the rest, after the last text."""
        return self._read(last=True)

    def _read(self, *, last: bool) -> AnswerDelta:
        texts: list[str] = []
        calls: list[CallDelta] = []
        while self._step(texts, calls, last=last):
            pass
        return AnswerDelta("".join(texts), tuple(calls))

    def _step(self, texts: list[str], calls: list[CallDelta], *, last: bool) -> bool:
        """Read a stretch of the buffer; return whether there may be more."""
        if self.format.name == "pythonic":
            return self._step_pythonic(texts, calls, last=last)
        if self._scanner is not None:
            return self._step_call(texts, calls, last=last)
        if self._in_calls:
            return self._step_between(texts, last=last)
        return self._step_text(texts, last=last)

    # Text before, between and after calls

    def _step_text(self, texts: list[str], *, last: bool) -> bool:
        start = self.format.start
        if not start:
            return self._step_unmarked(texts, last=last)
        found = self._buffer.find(start)
        if found >= 0:
            self._say(texts, self._buffer[:found].rstrip())
            space = self._buffer[len(self._buffer[:found].rstrip()) : found]
            self._raw, self._buffer, self._in_calls = space + start, self._buffer[found + len(start) :], True
            return True
        kept = 0 if last else _overlap(self._buffer, start)
        safe = self._buffer[: len(self._buffer) - kept]
        text = safe if last else safe.rstrip()  # white space before a call is not the answer's
        self._say(texts, text)
        self._buffer = self._buffer[len(text) :]
        return False

    def _step_unmarked(self, texts: list[str], *, last: bool) -> bool:
        """Read an answer that is calls only if it begins like one."""
        text, mark = self._buffer.lstrip(), self.format.optional_start
        if not self._begun and mark and text.startswith(mark):
            self._raw, self._buffer, self._in_calls = self._buffer[: -len(text)] + mark, text[len(mark) :], True
            return True
        if not self._begun and text.startswith("{"):
            self._raw, self._buffer, self._in_calls = self._buffer[: len(self._buffer) - len(text)], text, True
            return True
        if not self._begun and not last and (not text or mark.startswith(text)):
            return False
        self._say(texts, self._buffer)
        self._buffer = ""
        return False

    def _step_between(self, texts: list[str], *, last: bool) -> bool:
        """Read what stands before a call, or behind one."""
        marks = (self.format.start, self.format.end, self.format.closing, self.format.opening)
        text = self._buffer.lstrip(_BETWEEN)
        self._raw += self._buffer[: len(self._buffer) - len(text)]
        self._buffer = text
        if not last and (not text or any(mark != text and mark.startswith(text) for mark in marks)):
            return False
        for mark in filter(None, marks):
            if text.startswith(mark):
                self._raw, self._buffer = self._raw + mark, text[len(mark) :]
                return True
        if text and (text.startswith("{") or (self.format.name == "mistral" and _is_name(text[0]))):
            self._scanner = CallScanner(self.format.arguments)
            return True
        # Not a call: text again. What only separates calls is dropped behind one.
        self._in_calls = False
        self._say(texts, "" if self._raw_is_of_call() else self._raw)
        self._raw = ""
        return bool(text)

    def _raw_is_of_call(self) -> bool:
        return self.num_calls > 0 and (
            not self.format.start or self._raw.strip(_BETWEEN) in ("", self.format.end, self.format.closing)
        )

    # Calls

    def _step_call(self, texts: list[str], calls: list[CallDelta], *, last: bool) -> bool:
        scanner = self._scanner
        assert scanner is not None
        num_read, known = scanner.push(self._buffer, self.names)
        self._raw += self._buffer[:num_read]
        self._buffer = self._buffer[num_read:]
        if known is False or (last and not scanner.is_complete and not scanner.begun):
            self._scanner, self._in_calls = None, False
            self._say(texts, self._raw)
            self._raw = ""
            return bool(self._buffer)
        if scanner.begun:
            self._tell(calls, scanner)
        if scanner.is_complete:
            self.num_calls += 1
            self._scanner, self._raw = None, ""
            return True
        return False

    def _tell(self, calls: list[CallDelta], scanner: CallScanner) -> None:
        name, arguments = scanner.take()
        if (self.most is None or self.num_calls < self.most) and (name or arguments):
            calls.append(CallDelta(self.num_calls, name, arguments))

    def _step_pythonic(self, texts: list[str], calls: list[CallDelta], *, last: bool) -> bool:
        """Hold an answer that may be a list of calls until it ends; any other is text at once."""
        text = self._buffer.strip()
        if self._begun or not _may_be_pythonic(text, self.names):
            self._say(texts, self._buffer)
            self._buffer = ""
        elif last:
            found = read_pythonic(text, self.names)
            if found is None:
                self._say(texts, self._buffer)
            else:
                kept = found[: self.most]
                calls += [CallDelta(index, name, arguments) for index, (name, arguments) in enumerate(kept)]
                self.num_calls = len(kept)
            self._buffer = ""
        return False

    def _say(self, texts: list[str], text: str) -> None:
        texts.append(text)
        self._begun = self._begun or bool(text.strip())


def _may_be_pythonic(text: str, names: Collection[str]) -> bool:
    """Return whether a text may be the beginning of a list of calls."""
    if not text or text == "[":
        return True
    if not text.startswith("["):
        return False
    rest = text[1:].lstrip()
    return any(rest.startswith(f"{name}(") or f"{name}(".startswith(rest) for name in names)


def _is_name(character: str) -> bool:
    return character.isalnum() or character == "_"


def _overlap(text: str, mark: str) -> int:
    """Return the length of the longest end of ``text`` that begins ``mark``."""
    return next((size for size in range(min(len(text), len(mark) - 1), 0, -1) if mark.startswith(text[-size:])), 0)
