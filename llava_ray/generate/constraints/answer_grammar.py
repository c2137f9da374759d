"""The grammar of one answer: which tokens may follow, computed in another thread while the model runs."""

import time
from concurrent.futures import Executor
from threading import Event
from typing import TYPE_CHECKING

import numpy as np

from llava_ray.errors import RecordError
from llava_ray.generate.constraints.compiling import GrammarCompiler
from llava_ray.generate.constraints.schemas import STRUCTURED_OUTPUT

if TYPE_CHECKING:
    import llguidance

_SLOW_S = 0.05  # a mask that took longer is computed apart from the others


class AnswerGrammar:
    """A grammar and the part of it that the answer has followed. One thread at a time uses it."""

    def __init__(self, text: str, compiler: GrammarCompiler, field: str, lead: str = "") -> None:
        """Initialise for a checked grammar; ``lead`` is written first in an answer and is no part of its text."""
        self.text = text
        self.matcher: llguidance.LLMatcher = compiler.matcher(text)
        self.decode = compiler.decode
        self.end_tokens = compiler.end_tokens
        self.field = field
        self.lead = lead
        self.forbidden: np.ndarray | None = None
        """Whether each token of the tokenizer may not follow; None until it is computed, and after an error."""
        self.begun = 0.0
        self.is_slow = True  # the first mask builds tables
        self.is_late = False
        """Whether the last mask was not ready when it was needed."""
        self._ready = Event()

    def begin(self, quick: Executor, slow: Executor) -> None:
        """Begin to compute which tokens may follow."""
        self._ready.clear()
        self.begun = time.monotonic()
        (slow if self.is_slow else quick).submit(self._compute)

    def _compute(self) -> None:
        start = time.monotonic()
        try:
            mask = np.frombuffer(self.matcher.compute_bitmask(), np.uint8)
            forbidden = np.unpackbits(~mask, bitorder="little").view(np.bool_)
            if not self.matcher.is_accepting():  # an end token may be a word of the vocabulary, too
                forbidden[self.end_tokens] = True
            self.forbidden = None if self.matcher.is_error() or forbidden.all() else forbidden
        except Exception:  # noqa: BLE001 - whatever it was, the answer must end with an error, not wait
            self.forbidden = None
        self.is_slow = time.monotonic() - start > _SLOW_S
        self._ready.set()

    def wait(self, seconds: float) -> bool:
        """Wait until the tokens are known; return whether they are."""
        return self._ready.wait(seconds)

    def advance(self, token: int) -> bool:
        """Append a token; return whether nothing may follow it any more. Raises RecordError for one not allowed."""
        if not self.matcher.consume_token(token):
            raise self.failed()
        return self.matcher.is_stopped()

    def failed(self) -> RecordError:
        """Return the error for a grammar that cannot be followed further."""
        why = self.matcher.get_error().partition("<")[0].strip()[:200] or "no token may follow"
        return RecordError(
            f"{self.field} cannot be held any further in this answer ({why}); send a simpler one.",
            reason=STRUCTURED_OUTPUT,
            field=self.field,
        )
