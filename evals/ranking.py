"""Likelihood ranking: the option that a model finds likeliest, for weak models whose letters misjudge them.

evals knows no model: whoever has one says how likely each candidate is, and gets an answer that is scored like any
other (``pipelines/evaluate.py run --evaluate.ranking text``).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from evals.benchmark import LETTER, LETTER_CN, LETTERS, Question
from llava_ray.errors import DataError

Ranking = Literal["letter", "text"]
"""Rank the letters as next words, or the options' texts."""


@dataclass(frozen=True)
class LogLikelihood:
    """Sum over a candidate's tokens of their natural log-probabilities after the prompt, and how many tokens."""

    total: float
    num_tokens: int

    @property
    def mean(self) -> float:
        """Per token, so that short candidates have no advantage."""
        return self.total / max(1, self.num_tokens)


def candidates(question: Question, ranking: Ranking) -> tuple[str, ...]:
    """Return what is ranked. Raises DataError for a question without options."""
    if not question.options:
        raise DataError(f"question {question.id!r} has no options to rank; ranking is for multiple choice")
    return tuple(LETTERS[: len(question.options)]) if ranking == "letter" else question.options


def shown_to_rank(question: Question, ranking: Ranking) -> str:
    """Return the prompt: where texts are ranked, without the instruction to answer with a letter."""
    return question.prompt if ranking == "letter" else question.prompt.removesuffix(LETTER).removesuffix(LETTER_CN)


def best_letter(question: Question, likelihoods: Sequence[LogLikelihood]) -> str:
    """Return the letter of the likeliest option by mean log-probability; of equals, the first. Raises DataError."""
    if len(likelihoods) != len(question.options):
        raise DataError(f"question {question.id!r}: {len(likelihoods)} likelihoods for {len(question.options)} options")
    return LETTERS[max(range(len(likelihoods)), key=lambda number: likelihoods[number].mean)]
