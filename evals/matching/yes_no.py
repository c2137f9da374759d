"""Parsing of yes and no: POPE's rule, MME's rule, and ours, which never guesses."""

import re
from collections.abc import Sequence
from typing import Literal

from evals.matching.plain_text import to_plain_text, without_lead_in

_YesNo = Literal["yes", "no"]

_SIDE_BY_SIDE = re.compile(r"\byes\b[^\w\n]*(?:\b(?:or|and|nor)\b|[/&|])[^\w\n]*no\b(?! doubt\b)")
_WORD = re.compile(r"(?<![\w-])(yes|no)\b(?!-|\.? ?\d)")
_SAYS_NOTHING = re.compile(r" (?:doubt|idea|clue|way|one|information|question|problem|matter|longer|reason|need)\b")
_ENDS = re.compile(r" *(?:$|[^\w\s]|\n)")
_OPENS = re.compile(r"(?:^|[.!?\n。;:])[^\w,]*$")
_IS_NOT_THERE = re.compile(
    r"(?:\bthere(?: is| are| was| were|'s|'re)|\b(?:i|we|you)(?: can| could)? (?:see|find|observe|spot|detect)"
    r"|\b(?:the|this) (?:image|picture|photo|photograph|scene) (?:shows|has|contains|depicts|includes)) $"
)
_NEGATED = re.compile(r"\b(?:not|cannot|never|neither)\b|n't\b")
_IN_DOUBT = re.compile(r"\b(?:if|whether|when|unless|i doubt|doubtful|unclear|unsure)\b")
_CLAUSE = re.compile(r"[.,;:!?\n]")
_CLAUSE_FOLLOWS = re.compile(
    r" *(?:$|[^\w\s]|\n| (?:it|there|he|she|they|we|i|you|this|that|these|those|the|both|all)\b)"
)
_NEAR = 60  # characters of context before a word


def parse_pope(answer: str) -> _YesNo:
    """Parse by POPE's rule: "no" if "No", "not" or "no" is a word before the first period, else "yes"."""
    words = answer.split(".", maxsplit=1)[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def parse_mme(answer: str) -> _YesNo | None:
    """Parse by MME's rule: the first four characters, "yes" before "no"; a lone y or n counts."""
    text = answer.lower().strip().replace(".", "")
    if text in ("y", "n"):
        return "yes" if text == "y" else "no"
    start = text[:4]
    return "yes" if "yes" in start else "no" if "no" in start else None


def parse_yes_no(answer: str) -> _YesNo | None:
    """Parse yes or no if one is stated as the answer without contradiction; None in doubt.

    A "no" is an answer where a mark or the end follows it ("I would say no."), where it opens a sentence ("No dog is
    there") or follows "there is": elsewhere it belongs to what comes after it ("a dog with no collar"). Where both are
    said as answers neither counts; beside a "yes" in front, a later "no" or "not" of the other kind does not matter
    ("Yes, it is not red").
    """
    text = without_lead_in(to_plain_text(answer)).lower()
    if _SIDE_BY_SIDE.search(text):
        return None
    matches = [match for match in _WORD.finditer(text) if not _SAYS_NOTHING.match(text, match.end())]
    yes = [match for match in matches if match[1] == "yes"]
    no = [match for match in matches if match[1] == "no"]
    if yes:
        return None if any(_ENDS.match(text, one.end()) for one in no) else _plain_yes(text, yes[0], no)
    return "no" if any(_is_answer(text, one) for one in no) else None


def _plain_yes(text: str, first: re.Match[str], no: Sequence[re.Match[str]]) -> _YesNo | None:
    negated = bool(no) or _NEGATED.search(text) is not None
    if not any(char.isalnum() for char in text[: first.start()]):  # it comes first
        return "yes" if not negated or _CLAUSE_FOLLOWS.match(text, first.end()) else None
    return None if negated or _IN_DOUBT.search(text[: first.start()]) else "yes"


def _is_answer(text: str, no: re.Match[str]) -> bool:
    before = text[max(0, no.start() - _NEAR) : no.start()]
    if _OPENS.search(before):
        return True
    clause = _CLAUSE.split(before)[-1]
    if _NEGATED.search(clause) or _IN_DOUBT.search(clause):
        return False
    return _ENDS.match(text, no.end()) is not None or _IS_NOT_THERE.search(before) is not None
