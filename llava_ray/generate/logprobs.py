"""Log-probabilities of an answer's tokens, and of its prompt's.

All are the model's own: natural logarithms before temperature, penalties, biases and grammars, as in vLLM.
"""

from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class TokenLogprob:
    """A token, its text, its natural log-probability before temperature, and the likeliest others."""

    token_id: int
    text: str
    logprob: float
    top: tuple[tuple[int, str, float], ...] = ()
    """(id, text, log-probability) of the likeliest tokens, best first."""


class RankedLogprob(NamedTuple):
    """A token of the vocabulary at one place of a prompt, and its natural log-probability there."""

    token_id: int
    text: str
    logprob: float
    rank: int
    """1 for the likeliest token of the vocabulary."""


# For each token of a prompt itself and the likeliest others; None for the first token and those of images.
PromptLogprobs = tuple[tuple[RankedLogprob, ...] | None, ...]
