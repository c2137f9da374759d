"""Open answers of MMMU: the authors' lenient rule, and a strict one."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

GROUPED = re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b")
SCIENTIFIC = re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+")
SIMPLE = re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])")
INDICATORS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
TRIVIAL = (":", ",", ".", "!", "?", ";", "'")
DECIMALS = 2
WRITTEN = re.compile(r"(?<![\w.])-?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+|(?=\.\d))(?:\.\d+)?(?:[eE][+-]?\d+)?")


@dataclass(frozen=True)
class OpenAnswer:
    """What is said last in an answer, in lower case, and its only number, if it has one."""

    text: str
    number: float | None

    def fits(self, truths: Sequence[str]) -> bool:
        """Tell whether it is one of the truths: the same number at two decimals, or the truth's words in it."""
        for truth in truths:
            goal = _number(truth)
            if goal is not None:
                if self.number is not None and round(self.number, DECIMALS) == round(goal, DECIMALS):
                    return True
            elif re.search(rf"(?<!\w){re.escape(truth.strip().lower())}(?!\w)", self.text):
                return True
        return False


def parse_open_answer(answer: str) -> OpenAnswer | None:
    """Return what is said last; None for nothing, or for two numbers to choose from ("5 or 6")."""
    text = answer.strip().rstrip(".").lower()
    tail = re.split(r"(?:\bis|\bare|\bbe|=|:)\s+", text)[-1].strip()
    numbers = {value for found in WRITTEN.findall(tail) if (value := _number(found)) is not None}
    if not tail or (len(numbers) > 1 and re.search(r"\bor\b|/|\bto\b", tail)):
        return None
    return OpenAnswer(tail, numbers.pop() if len(numbers) == 1 else None)


def open_answer_is_right(answer: str, truths: Sequence[str]) -> bool:
    """Tell whether MMMU's script would count it: any number or phrase after an indicator that fits.

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
        marks = (*INDICATORS, "=") if number == len(parts) - 1 else INDICATORS
        tails = [part.split(mark)[-1].strip() for mark in marks if mark in part]
        shortest = min(tails, key=len) if tails else ""
        if shortest and shortest not in TRIVIAL:
            phrases.append(shortest)
    phrases = phrases or [text]
    return [form for phrase in [*phrases, *(n for p in phrases for n in _numbers(p))] for form in _normal_forms(phrase)]


def _numbers(text: str) -> list[str]:
    return [*GROUPED.findall(text), *SCIENTIFIC.findall(text), *SIMPLE.findall(text)]


def _normal_forms(text: str) -> list[str | float]:
    text = text.strip()
    number = _number(text)
    if number is not None:
        return [round(number, DECIMALS)]
    lowered = text.lower()
    return [f" {lowered}", f"{lowered} "] if len(lowered) == 1 else [lowered]


def _number(text: str) -> float | None:
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return None
