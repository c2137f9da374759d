"""Incremental detokenisation: tokens become text that never has to be retracted."""

from collections.abc import Callable, Sequence

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what a tokenizer decodes to in the middle of a character
_WINDOW = 16  # tokens that are decoded together: a few before the newest, on which its spaces depend
_OVERLAP = 6  # of these, where a new window begins
_MOST_BYTES = 8  # tokens without a complete character, after which their bytes count as invalid


class Detokenizer:
    """Decodes a growing list of tokens, a window at a time."""

    def __init__(self, decode: Callable[[Sequence[int]], str], before: Sequence[int] = ()) -> None:
        """Initialise with the tokenizer's own ``decode``; ``before`` are tokens that the list continues."""
        self.decode = decode
        images = [place for place, token in enumerate(before[-_OVERLAP:], start=1) if token < 0]
        self.window = list(before[-_OVERLAP:])[max(images, default=0) :]
        self.known = decode(self.window) if self.window else ""
        self.num_unfinished = 0

    def push(self, token: int) -> str:
        """Add a token and return the text that is final now."""
        self.window.append(token)
        text = self.decode(self.window)
        if text.endswith(_UNFINISHED) and self.num_unfinished < _MOST_BYTES:
            self.num_unfinished += 1
            return ""
        self.num_unfinished = 0
        new = text[len(self.known) :]
        self.known = text
        if len(self.window) >= _WINDOW:
            self.window = self.window[-_OVERLAP:]
            self.known = self.decode(self.window)
        return new


class AnswerText:
    """The text of one answer: withheld while it may still become a stop text, truncated where one begins.

    With ``strip`` it begins and ends without white space, as ``decoding.answer_text`` has it.
    """

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        stops: Sequence[str] = (),
        *,
        strip: bool = True,
        lead: str = "",
        before: Sequence[int] = (),
    ) -> None:
        """Initialise an empty answer; ``lead`` is what it begins with that is no part of its text.

        ``before`` are the tokens of a text that it continues.
        """
        self.detokenizer = Detokenizer(decode, before)
        self.stops = tuple(stops)
        self.strip = strip
        self.lead = lead
        self.stopped = False
        self.has_begun = False
        self.pending = ""

    def push(self, token: int) -> str:
        """Add a token and return the text that is final now; ``stopped`` is set once a stop text is found."""
        self.pending += self.detokenizer.push(token)
        if self.lead and self.pending:
            self.pending, self.lead = self.pending.removeprefix(self.lead), ""
        ends = [found for stop in self.stops if (found := self.pending.find(stop)) >= 0]
        if ends:
            self.stopped = True
            return self._release(self.pending[: min(ends)], last=True)
        return self._release(self.pending)

    def finish(self) -> str:
        """Return the withheld text after the last token, without an incomplete character."""
        return "" if self.stopped else self._release(self.pending, last=True)

    def _release(self, text: str, *, last: bool = False) -> str:
        final = text if last else text[: len(text) - find_stop_prefix(text, self.stops)]
        if self.strip:
            final = final.rstrip()
            released = final if self.has_begun else final.lstrip()
        else:
            released = final
        self.has_begun = self.has_begun or bool(released)
        self.pending = "" if last else text[len(final) :]
        return released


def find_stop_prefix(text: str, stops: Sequence[str]) -> int:
    """Return the length of a text's longest suffix that is a prefix of a stop text."""
    for length in range(min(len(text), max(map(len, stops), default=1) - 1), 0, -1):
        if any(stop.startswith(text[-length:]) for stop in stops):
            return length
    return 0
