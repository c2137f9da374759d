"""Matching of MMMU's open answers: the authors' lenient rule, and a strict one."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from evals.matching.numbers import may_mean
from evals.matching.plain_text import to_plain_text, without_lead_in
from evals.matching.quantities import Quantity, stated_quantity, whole_quantity

_GROUPED = re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b")
_SCIENTIFIC = re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+")
_SIMPLE = re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])")
_INDICATORS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_TRIVIAL = (":", ",", ".", "!", "?", ";", "'")
_DECIMALS = 2
_SAID_LAST = re.compile(r"(?:\bis|\bare|\bbe|=|:)\s+", re.IGNORECASE)
_IN_DOUBT = re.compile(r"\b(?:not|never|or|neither|nor|unlike|except)\b|n't\b")


@dataclass(frozen=True)
class OpenAnswer:
    """The last statement of an answer, in lower case, and its only number, if it has one."""

    text: str
    number: Quantity | None

    def fits(self, truths: Sequence[str]) -> bool | None:
        """Return whether it matches a truth: the same number at two decimals, or the truth's words in it.

        None where that is undecidable: truths are numbers and there is not one number, or words with "not" or "or".
        """
        found = [self._fits(truth) for truth in truths]
        return True if True in found else False if False in found else None

    def _fits(self, truth: str) -> bool | None:
        goal = whole_quantity(to_plain_text(truth))
        if goal is not None:
            if self.number is None:
                return None
            return _same_number(self.number, goal) or (None if may_mean(self.number, goal) else False)
        words = to_plain_text(truth).lower().strip(" .")
        if not re.search(rf"(?<!\w){re.escape(words)}(?!\w)", self.text):
            return False
        return None if _IN_DOUBT.search(self.text.replace(words, " ")) else True


def parse_open_answer(answer: str) -> OpenAnswer | None:
    """Parse the last statement of an answer, and its number; None if it is empty."""
    tail = _SAID_LAST.split(without_lead_in(to_plain_text(answer)).rstrip("."))[-1].strip()
    return OpenAnswer(tail.lower(), stated_quantity(tail)) if tail else None


def _same_number(stated: Quantity, goal: Quantity) -> bool:
    ways = {stated.value, stated.value / 100} if stated.percent and not goal.percent else {stated.value}
    goals = {goal.value, goal.value / 100} if goal.percent and not stated.percent else {goal.value}
    return any(round(one, _DECIMALS) == round(other, _DECIMALS) for one in ways for other in goals)


def open_answer_is_right(answer: str, truths: Sequence[str]) -> bool:
    """Return whether MMMU's script accepts an answer: any matching number or phrase after an indicator.

    "It is 5 or 6" fits 6; a text fits if the truth is anywhere in it.
    """
    candidates = _candidates(answer)
    goals = [goal for truth in truths for goal in _normal_forms(truth)]
    for candidate in candidates:
        if isinstance(candidate, str):
            if any(isinstance(goal, str) and goal in candidate for goal in goals):
                return True
        elif candidate in goals:
            return True
    return False


def _candidates(answer: str) -> list[str | float]:
    text = answer.strip().strip(".").lower()
    parts = re.split(r"\.\s(?=[A-Z])|\n", text)
    phrases = []
    for number, part in enumerate(parts):
        marks = (*_INDICATORS, "=") if number == len(parts) - 1 else _INDICATORS
        tails = [part.split(mark)[-1].strip() for mark in marks if mark in part]
        shortest = min(tails, key=len) if tails else ""
        if shortest and shortest not in _TRIVIAL:
            phrases.append(shortest)
    phrases = phrases or [text]
    return [form for phrase in [*phrases, *(n for p in phrases for n in _numbers(p))] for form in _normal_forms(phrase)]


def _numbers(text: str) -> list[str]:
    return [*_GROUPED.findall(text), *_SCIENTIFIC.findall(text), *_SIMPLE.findall(text)]


def _normal_forms(text: str) -> list[str | float]:
    text = text.strip()
    number = _number(text)
    if number is not None:
        return [round(number, _DECIMALS)]
    lowered = text.lower()
    return [f" {lowered}", f"{lowered} "] if len(lowered) == 1 else [lowered]


def _number(text: str) -> float | None:
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return None
