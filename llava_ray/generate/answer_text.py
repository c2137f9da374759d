"""Tokens that come one by one, turned into text that never has to be taken back."""

from collections.abc import Callable, Sequence

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what a tokenizer decodes to in the middle of a character
_WINDOW = 16  # tokens that are decoded together: a few before the newest, on which its spaces depend
_KEPT = 6  # of these, where a new window begins
_MOST_BYTES = 8  # tokens without a whole character, after which their bytes are none


class Detokenizer:
    """Decodes a growing list of tokens, a window at a time."""

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        """``decode`` is the tokenizer's own."""
        self.decode = decode
        self.window: list[int] = []
        self.known = ""
        self.num_unfinished = 0

    def push(self, token: int) -> str:
        """Return the text that is certain now."""
        self.window.append(token)
        text = self.decode(self.window)
        if text.endswith(_UNFINISHED) and self.num_unfinished < _MOST_BYTES:
            self.num_unfinished += 1
            return ""
        self.num_unfinished = 0
        new = text[len(self.known) :]
        self.known = text
        if len(self.window) >= _WINDOW:
            self.window = self.window[-_KEPT:]
            self.known = self.decode(self.window)
        return new


class AnswerText:
    """The text of one answer: held back while it may still become a stop text, cut where one begins.

    With ``strip`` it begins and ends without white space, as ``decoding.answer_text`` has it.
    """

    def __init__(
        self, decode: Callable[[Sequence[int]], str], stops: Sequence[str] = (), *, strip: bool = True
    ) -> None:
        """Begin with nothing."""
        self.detokenizer = Detokenizer(decode)
        self.stops = tuple(stops)
        self.strip = strip
        self.stopped = False
        self.has_begun = False
        self.pending = ""

    def push(self, token: int) -> str:
        """Return the text that may be shown now; ``stopped`` tells whether a stop text has come."""
        self.pending += self.detokenizer.push(token)
        ends = [found for stop in self.stops if (found := self.pending.find(stop)) >= 0]
        if ends:
            self.stopped = True
            return self._show(self.pending[: min(ends)], last=True)
        return self._show(self.pending)

    def finish(self) -> str:
        """Return what has been held back, when no more tokens come. Half a character stays out."""
        return "" if self.stopped else self._show(self.pending, last=True)

    def _show(self, text: str, *, last: bool = False) -> str:
        certain = text if last else text[: len(text) - longest_beginning(text, self.stops)]
        if self.strip:
            certain = certain.rstrip()
            shown = certain if self.has_begun else certain.lstrip()
        else:
            shown = certain
        self.has_begun = self.has_begun or bool(shown)
        self.pending = "" if last else text[len(certain) :]
        return shown


def longest_beginning(text: str, stops: Sequence[str]) -> int:
    """Return how many of the last characters of a text may be the beginning of a stop text."""
    for length in range(min(len(text), max(map(len, stops), default=1) - 1), 0, -1):
        if any(stop.startswith(text[-length:]) for stop in stops):
            return length
    return 0
