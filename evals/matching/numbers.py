"""Comparison of numbers and similar texts: ChartQA's relaxed accuracy, DocVQA's ANLS."""

import math
import re
from collections.abc import Sequence

from evals.benchmark import UNPARSED, Grade
from evals.matching.number_words import digits_for_ordinals
from evals.matching.plain_text import to_plain_text, without_label, without_lead_in
from evals.matching.quantities import MONEY, Quantity, stated_quantity, whole_quantity
from evals.matching.yes_no import parse_yes_no

_TOLERANCE = 0.05
_ANLS_THRESHOLD = 0.5
_PERCENT = 0.01
_YEARS = range(1500, 2101)
_ORDINAL_NUMBER = re.compile(r"\b\d+(?:st|nd|rd|th)\b")


def relaxed_accuracy(answer: str, truth: str) -> bool:
    """Return whether a number is within 5 % of the truth, or else whether the texts are equal ignoring case.

    As published: "%" divides by a hundred, a truth of 0 and anything with a comma are compared as texts.
    """
    answered, right = _as_float(answer), _as_float(truth)
    if answered is not None and right:
        return abs(answered - right) / abs(right) <= _TOLERANCE
    return answer.lower() == truth.lower()


def _grade_number(answer: str, truth: str) -> bool | None:
    """Return whether the only stated number is within 5 % of the truth; None if there is none.

    "$1,234.", "5 million", "1/2" and "about 14 %" are numbers, years have to be exact, and 0 is 0. A percentage may be
    said without its sign, and a number with one ("14" for "14%" and as before "0.14", "2%" for "2"). Beside a truth
    that is no number, texts are compared but for case and marks; yes and no are read as such.
    """
    text, goal_text = without_lead_in(to_plain_text(answer)), to_plain_text(truth)
    goal = whole_quantity(goal_text)
    if goal is None:
        return _same_text(text, goal_text)
    stated = stated_quantity(text)
    if stated is None or _other_unit(stated, goal):
        return None
    if _is_same(stated, goal, is_year="," not in truth):
        return True
    return None if may_mean(stated, goal) else False


def grade_numbers(answer: str, truths: Sequence[str]) -> Grade:
    """Grade an answer by ``_grade_number`` against several truths; unparsed if it is for all of them."""
    found = [_grade_number(answer, truth) for truth in truths]
    if not to_plain_text(answer) or all(one is None for one in found):
        return UNPARSED
    return Grade(float(True in found), to_plain_text(answer))


def _is_same(stated: Quantity, goal: Quantity, *, is_year: bool) -> bool:
    if stated.unit in MONEY and goal.unit in MONEY and stated.unit != goal.unit:
        return False
    is_year = is_year and goal.value in _YEARS and not goal.percent and not goal.unit
    if is_year:
        return stated.value == goal.value and not stated.percent
    ways, goals = {stated.value}, {goal.value}
    if stated.percent != goal.percent:
        ways |= {stated.value * _PERCENT} if stated.percent else set()
        goals |= {goal.value * _PERCENT} if goal.percent else set()
    return any(_near(one, other) for one in ways for other in goals)


def may_mean(stated: Quantity, goal: Quantity) -> bool:
    """Return whether an ambiguous quantity may be correct: "5/10" may mean five of ten, and "5 M" five metres."""
    ways = (stated.value, stated.other, stated.numerator)
    pairs = [(way, end) for way in ways for end in (goal.value, goal.other)][1:]
    return any(one is not None and other is not None and _near(one, other) for one, other in pairs)


def _other_unit(stated: Quantity, goal: Quantity) -> bool:
    """Return whether both have different units, such as 3 cm and 3 m, which are not converted."""
    units = {stated.unit, goal.unit} - {""}
    return len(units) > 1 and not units <= set(MONEY)


def _same_text(text: str, truth: str) -> bool | None:
    if truth.strip(" .").lower() in ("yes", "no"):
        parsed = parse_yes_no(text)
        return None if parsed is None else parsed == truth.strip(" .").lower()
    one, other = (digits_for_ordinals(_plain(words)) for words in (text, truth))
    if _ORDINAL_NUMBER.fullmatch(other) and not _ORDINAL_NUMBER.search(one):
        return None
    return one == other if one else None


def anls(answer: str, truths: Sequence[str]) -> float:
    """Compute DocVQA's score: distances over texts with single spaces, lengths over the raw ones."""
    return _best(answer, truths, squeeze=True, raw_lengths=True)


def anls_st_vqa(answer: str, truths: Sequence[str]) -> float:
    """Compute LLaVA's score, after ST-VQA: inner spaces count."""
    return _best(answer.strip(), [truth.strip() for truth in truths], squeeze=False, raw_lengths=True)


def anls_robust(answer: str, truths: Sequence[str]) -> float:
    """Compute the score over plain texts with single spaces, without "Answer:" or one final period."""
    texts = [without_label(to_plain_text(text)).removesuffix(".").rstrip() for text in (answer, *truths)]
    return _best(texts[0], texts[1:], squeeze=True, raw_lengths=False)


def edit_distance(left: str, right: str) -> int:
    """Compute the Levenshtein distance."""
    if len(left) < len(right):
        left, right = right, left
    row = list(range(len(right) + 1))
    for i, one in enumerate(left, start=1):
        previous, row[0] = row[0], i
        for j, other in enumerate(right, start=1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (one != other))
    return row[-1]


def _best(answer: str, truths: Sequence[str], *, squeeze: bool, raw_lengths: bool) -> float:
    best = 0.0
    for truth in truths:
        texts = [" ".join(text.lower().split()) if squeeze else text.lower() for text in (answer, truth)]
        longest = max(map(len, (answer, truth) if raw_lengths else texts))
        if longest:
            best = max(best, 1 - edit_distance(texts[0], texts[1]) / longest)
    return best if best >= _ANLS_THRESHOLD else 0.0


def _as_float(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def _near(value: float, goal: float) -> bool:
    if math.isnan(value) or math.isnan(goal):
        return False
    return value == goal if goal == 0 else abs(value - goal) <= _TOLERANCE * abs(goal) * (1 + 1e-9)


def _plain(text: str) -> str:
    """Normalise a text: lower case, without surrounding marks and spaces around commas and dashes."""
    return re.sub(r" ?([,-]) ?", r"\1", " ".join(text.lower().split()).strip(" .!?\"'[]()"))
