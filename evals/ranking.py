"""Likelihood ranking of options, for weak models that cannot answer with letters.

evals is independent of models: the caller provides each candidate's likelihood, and gets an answer that is scored like
any other (``pipelines/evaluate.py run --evaluate.ranking text``).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from evals.benchmark import LETTER, LETTER_CN, LETTER_PRO, LETTERS, Question
from llava_ray.errors import DataError

Ranking = Literal["letter", "text"]
"""Rank the letters as next tokens, or the options' texts."""


@dataclass(frozen=True)
class LogLikelihood:
    """The sum of a candidate's natural log-probabilities after the prompt, and its number of tokens."""

    total: float
    num_tokens: int

    @property
    def mean(self) -> float:
        """Return the mean per token, so that short candidates have no advantage."""
        return self.total / max(1, self.num_tokens)


def list_candidates(question: Question, ranking: Ranking) -> tuple[str, ...]:
    """Return the candidates to rank. Raises DataError for a question without options."""
    if not question.options:
        raise DataError(f"question {question.id!r} has no options to rank; ranking is for multiple choice")
    return tuple(LETTERS[: len(question.options)]) if ranking == "letter" else question.options


def ranking_prompt(question: Question, ranking: Ranking) -> str:
    """Return the prompt, without the letter instruction if texts are ranked."""
    prompt = question.prompt
    if ranking == "text":
        for instruction in (LETTER, LETTER_CN, LETTER_PRO):
            prompt = prompt.removesuffix(instruction)
    return prompt


def find_best_letter(question: Question, likelihoods: Sequence[LogLikelihood]) -> str:
    """Return the letter of the most likely option by mean log-probability, the first of equals. Raises DataError."""
    if len(likelihoods) != len(question.options):
        raise DataError(f"question {question.id!r}: {len(likelihoods)} likelihoods for {len(question.options)} options")
    return LETTERS[max(range(len(likelihoods)), key=lambda number: likelihoods[number].mean)]
