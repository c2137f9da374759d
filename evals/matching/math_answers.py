"""MathVista's answers: the authors' extraction and normalisation, and a robust reading of numbers and lists."""

import ast
import math
import re
from collections.abc import Sequence

from evals.benchmark import LETTERS
from evals.matching.numbers import edit_distance
from evals.matching.open_answers import parse_open_answer
from evals.matching.plain_text import to_plain_text

_IN_BRACKETS = re.compile(r"\(([a-zA-Z])\)")
_QUOTED = re.compile(r'The answer is "(.*)"\.')
_LIST = re.compile(r"\[[^\[\]]*\]")
_MAX_LIST = 2_000  # characters


def extract_plainly(answer: str, answer_type: str, choices: Sequence[str]) -> str | None:
    """Return the extraction that the authors' script makes without a language model; None where it needs one."""
    if choices:
        return answer if answer in choices else None
    try:
        if answer_type == "integer":
            return str(int(answer))
        return str(float(answer)) if answer_type == "float" else None
    except (ValueError, OverflowError):
        return None


def extract_quickly(answer: str) -> str | None:
    """Return what the authors' quick rule extracts: the quoted text after "The answer is", with a full stop."""
    found = _QUOTED.search(answer)
    return found[1] if found else None


def normalise_extraction(extraction: str, answer_type: str, choices: Sequence[str], precision: int) -> str | None:
    """Normalise an extraction by the authors' rule; None where it has not the form of the answer.

    A choice is that of the first letter in parentheses, of the letter that the extraction is, or else the most similar
    one by edit distance (the first of equals). A number is truncated to an integer, or rounded to the precision.
    """
    text = extraction.strip()
    if choices:
        named = _IN_BRACKETS.search(text)
        text = named[1].upper() if named else text
        if text in tuple(LETTERS[: len(choices)]):
            return choices[LETTERS.index(text)]
        return min(choices, key=lambda choice: edit_distance(text, choice)) if text else None
    try:
        if answer_type == "integer":
            return str(int(float(text)))
        return str(round(float(text), precision)) if answer_type == "float" else text
    except (ValueError, OverflowError):
        return None


def parse_number(answer: str) -> float | None:
    """Return the only number that an answer states last, None in doubt."""
    said = parse_open_answer(answer)
    return said.number.value if said and said.number and math.isfinite(said.number.value) else None


def parse_list(text: str) -> list[float] | None:
    """Return the only list of numbers in a text; None if there is none, or several that differ."""
    found = {tuple(numbers) for part in _LIST.findall(to_plain_text(text)) if (numbers := _numbers(part)) is not None}
    return list(found.pop()) if len(found) == 1 else None


def _numbers(text: str) -> list[float] | None:
    if len(text) > _MAX_LIST:
        return None
    try:
        values = ast.literal_eval(text)
        return [float(value) for value in values] if all(isinstance(value, int | float) for value in values) else None
    except (ValueError, SyntaxError, OverflowError, MemoryError, RecursionError):
        return None
