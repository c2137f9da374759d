"""Pairs of answers: which of a question's answers are compared, which of two is better, and how lengths are balanced.

Pure functions of answers and scores; every choice is made by a hash, so that the same answers give the same pairs.
"""

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from evals.benchmarks.custom import exact

AnswerKind = Literal["sample", "truth", "noised_image", "swapped_image", "replaced_words"]
_KIND_MARKS: Mapping[AnswerKind, str] = {
    "sample": "",
    "truth": "truth",
    "noised_image": "-noised",
    "swapped_image": "-swapped",
    "replaced_words": "-replaced",
}


@dataclass(frozen=True)
class CandidateAnswer:
    """One answer to a question, with where it comes from."""

    text: str
    kind: AnswerKind = "sample"
    model: int = 0
    """The number of the model that gave it."""
    sample: int = 0
    origin: Mapping[str, Any] = field(default_factory=dict, compare=False)
    """Model, fingerprint, seed and settings, for the provenance."""
    ended: bool = True

    @property
    def label(self) -> str:
        """Return a name that no other answer to the question has."""
        mark = _KIND_MARKS[self.kind]
        return mark if self.kind == "truth" else f"{self.model}.{self.sample}{mark}"


@dataclass(frozen=True)
class AnswerPair:
    """Two answers to a question that may be compared."""

    question: str
    first: CandidateAnswer
    second: CandidateAnswer

    @property
    def id(self) -> str:
        """Return the pair's id."""
        return f"{self.question}#{self.first.label}|{self.second.label}"

    @property
    def swapped(self) -> "AnswerPair":
        """Return the pair the other way round."""
        return AnswerPair(self.question, self.second, self.first)


@dataclass(frozen=True)
class DecidedPair:
    """A pair whose first answer is the better one, with the evidence."""

    pair: AnswerPair
    evidence: Mapping[str, Any]

    @property
    def lead_in_length(self) -> int:
        """Return by how many characters the chosen answer is longer."""
        return len(self.pair.first.text.strip()) - len(self.pair.second.text.strip())


def draw(*words: object) -> int:
    """Return a number of 52 bits that depends on the words alone."""
    return int.from_bytes(hashlib.sha256(json.dumps(words).encode()).digest()[:8], "big") >> 12


def normalise(text: str) -> str:
    """Return the form in which two answers are compared: plain text in lower case, without a final period."""
    return " ".join(exact(text).split()) or text.strip()


def drop_unusable(
    answers: Sequence[CandidateAnswer], counts: Counter[str], *, keep_cut_off: bool
) -> list[CandidateAnswer]:
    """Return the answers that can be learnt from: no empty ones, nor those that were cut off."""
    kept = []
    for answer in answers:
        if not answer.text.strip():
            counts["empty_answers"] += 1
        elif not answer.ended and not keep_cut_off:
            counts["cut_off_answers"] += 1
        else:
            kept.append(answer)
    return kept


def list_pairs(
    question: str, answers: Sequence[CandidateAnswer], most: int, seed: int, counts: Counter[str]
) -> list[AnswerPair]:
    """Return up to ``most`` pairs of different answers, chosen by the seed; count equal, repeated and left ones."""
    found: dict[frozenset[str], AnswerPair] = {}
    for first, second in itertools.combinations(answers, 2):
        texts = frozenset((normalise(first.text), normalise(second.text)))
        counts["possible_pairs"] += 1
        if len(texts) == 1:
            counts["equal_pairs"] += 1
        elif texts in found:
            counts["repeated_pairs"] += 1
        else:
            found[texts] = AnswerPair(question, first, second)
    return choose_pairs(list(found.values()), most, seed, counts)


def choose_pairs(pairs: Sequence[AnswerPair], most: int, seed: int, counts: Counter[str]) -> list[AnswerPair]:
    """Return up to ``most`` pairs in their order, chosen by the seed; count the others."""
    counts["pairs_beyond_most"] += max(0, len(pairs) - most)
    chosen = {pair.id for pair in sorted(pairs, key=lambda pair: draw(seed, "pair", pair.id))[:most]}
    return [pair for pair in pairs if pair.id in chosen]


def decide_by_scores(
    question: str,
    answers: Sequence[CandidateAnswer],
    score: Callable[[CandidateAnswer], float | None],
    most: int,
    seed: int,
    counts: Counter[str],
) -> list[DecidedPair]:
    """Return up to ``most`` pairs of answers with different scores, the higher one first; None is no score."""
    scores = {answer.label: score(answer) for answer in answers}
    counts["unscored_answers"] += sum(value is None for value in scores.values())
    scored = [answer for answer in answers if scores[answer.label] is not None]
    ranked: list[AnswerPair] = []
    for pair in list_pairs(question, scored, len(scored) ** 2, seed, counts):
        first, second = scores[pair.first.label], scores[pair.second.label]
        assert first is not None
        assert second is not None
        if first == second:
            counts["tied_pairs"] += 1
        else:
            ranked.append(pair if first > second else pair.swapped)
    return [
        DecidedPair(pair, {"scores": {"chosen": scores[pair.first.label], "rejected": scores[pair.second.label]}})
        for pair in choose_pairs(ranked, most, seed, counts)
    ]


Verdict = Literal["first", "second", "tied", "inconsistent", "failed", "open"]


def judge_pair(leads: Sequence[float | None], *, is_open: bool) -> Verdict:
    """Return the verdict of all reviews of a pair: the lead of its first answer in each, None without scores.

    A winner is one in every review, whatever the order. A review without scores is no verdict, nor is one that is still
    to come.
    """
    if is_open:
        return "open"
    if not leads or any(lead is None for lead in leads):
        return "failed"
    signs = {(lead > 0) - (lead < 0) for lead in leads if lead is not None}
    if len(signs) > 1:
        return "inconsistent"
    return {1: "first", -1: "second", 0: "tied"}[signs.pop()]  # type: ignore[return-value]


def measure_length_bias(pairs: Sequence[DecidedPair]) -> dict[str, float | int | None]:
    """Return the length bias: how often the chosen answer is the longer one, and by how much on average."""
    leads = [pair.lead_in_length for pair in pairs]
    longer, shorter = sum(lead > 0 for lead in leads), sum(lead < 0 for lead in leads)
    unequal = longer + shorter
    return {
        "chosen_longer": longer,
        "rejected_longer": shorter,
        "chosen_longer_share": round(longer / unequal, 4) if unequal else None,
        "mean_length_difference": round(sum(leads) / len(leads), 4) if leads else None,
    }


def balance_pair_lengths(pairs: Sequence[DecidedPair], seed: int) -> list[DecidedPair]:
    """Drop pairs, the most unequal first, until chosen and rejected answers are the longer ones equally often."""
    longer = [pair for pair in pairs if pair.lead_in_length > 0]
    shorter = [pair for pair in pairs if pair.lead_in_length < 0]
    larger = longer if len(longer) > len(shorter) else shorter
    order = sorted(larger, key=lambda one: (-abs(one.lead_in_length), draw(seed, "length", one.pair.id)))
    dropped = {one.pair.id for one in order[: abs(len(longer) - len(shorter))]}
    return [one for one in pairs if one.pair.id not in dropped]
