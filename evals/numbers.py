"""Numbers and near-equal texts: ChartQA's relaxed accuracy, DocVQA's ANLS."""

import math
import re
from collections.abc import Sequence

TOLERANCE = 0.05
ANLS_THRESHOLD = 0.5
SCALES = {"thousand": 1e3, "million": 1e6, "billion": 1e9, "trillion": 1e12}
NUMBER = re.compile(
    r"[$€£¥]?\s*(-?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?(?:e[+-]?\d+)?)\.?\s*(%|percent|thousand|million|billion|trillion)?\.?",
    re.IGNORECASE,
)
YEARS = range(1500, 2101)


def relaxed_accuracy(answer: str, truth: str) -> bool:
    """Tell whether a number is within 5 % of the truth, else whether the texts agree but for case.

    As published: "%" divides by a hundred, a truth of 0 and anything with a comma are compared as texts.
    """
    said, right = _as_float(answer), _as_float(truth)
    if said is not None and right:
        return abs(said - right) / abs(right) <= TOLERANCE
    return answer.lower() == truth.lower()


def robust_relaxed_accuracy(answer: str, truth: str) -> bool:
    """Tell the same, reading "$1,234.", "5 million" and "14 %" as numbers; years have to be exact, and 0 is 0.

    A percentage may be said without its sign ("14" for "14%", and as before "0.14").
    """
    said, right = read_number(answer), read_number(truth)
    if said is None or right is None:
        return _plain(answer) == _plain(truth)
    (value, percent), (goal, goal_percent) = said, right
    if goal == int(goal) and int(goal) in YEARS and not goal_percent and "," not in truth:
        return value == goal and not percent
    ways = {value * (0.01 if percent else 1.0), value} if goal_percent and not percent else {_scaled(said)}
    goals = {_scaled(right), goal} if goal_percent and not percent else {_scaled(right)}
    return any(_near(one, other) for one in ways for other in goals)


def read_number(text: str) -> tuple[float, bool] | None:
    """Return a number and whether it is a percentage, or None for a text that is not one number."""
    match = NUMBER.fullmatch(text.strip())
    if not match or not any(char.isdigit() for char in match[1]):
        return None
    unit = (match[2] or "").lower()
    return float(match[1].replace(",", "")) * SCALES.get(unit, 1.0), unit in ("%", "percent")


def anls(answer: str, truths: Sequence[str]) -> float:
    """Return DocVQA's score: distances over texts with single spaces, lengths over the raw ones."""
    return _best(answer, truths, squeeze=True, raw_lengths=True)


def anls_st_vqa(answer: str, truths: Sequence[str]) -> float:
    """Return the score of LLaVA's tree, after ST-VQA: inner spaces count."""
    return _best(answer.strip(), [truth.strip() for truth in truths], squeeze=False, raw_lengths=True)


def anls_robust(answer: str, truths: Sequence[str]) -> float:
    """Return the score with distances and lengths both over texts with single spaces."""
    return _best(answer, truths, squeeze=True, raw_lengths=False)


def edit_distance(left: str, right: str) -> int:
    """Return Levenshtein's distance."""
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
    return best if best >= ANLS_THRESHOLD else 0.0


def _as_float(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def _scaled(number: tuple[float, bool]) -> float:
    return number[0] / 100 if number[1] else number[0]


def _near(value: float, goal: float) -> bool:
    if math.isnan(value) or math.isnan(goal):
        return False
    return value == goal if goal == 0 else abs(value - goal) <= TOLERANCE * abs(goal) * (1 + 1e-9)


def _plain(text: str) -> str:
    return " ".join(text.lower().split()).rstrip(".").rstrip()
