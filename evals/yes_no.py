"""Yes or no in an answer: POPE's rule, MME's rule, and ours, which never guesses."""

import re
from typing import Literal

YesNo = Literal["yes", "no"]

LEADING = re.compile(r"[\W_]*(yes|no)\b(?!-)(\W*)")
SENTENCES = re.compile(r"[.!?\n。！？]+")
SAID = re.compile(r"\b(yes|no)\b(?!-| idea\b| doubt\b)")
NEGATED = re.compile(r"\bnot\b|n['’]t\b")


def parse_pope(answer: str) -> YesNo:
    """Return "no" if "No", "not" or "no" is a word of the text before the first period, "yes" for all else."""
    words = answer.split(".", maxsplit=1)[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def parse_mme(answer: str) -> YesNo | None:
    """Return what the first four characters contain, "yes" before "no"; a lone y or n counts."""
    text = answer.lower().strip().replace(".", "")
    if text in ("y", "n"):
        return "yes" if text == "y" else "no"
    start = text[:4]
    return "yes" if "yes" in start else "no" if "no" in start else None


def parse_yes_no(answer: str) -> YesNo | None:
    """Return yes or no where one is said as a word and nothing speaks against it; None for anything in doubt.

    Where "yes" stands beside "no" or "not", the first word decides if a mark follows it ("Yes, it is not red") and no
    other sentence begins with the contrary ("Yes. no").
    """
    text = answer.lower().replace("*", "").strip()
    said = {_yes_no(word) for word in SAID.findall(text)}
    if said == {"no"} or (said == {"yes"} and not NEGATED.search(text)):
        return said.pop()
    lead = LEADING.match(text)
    if not said or lead is None or not lead[2].strip():
        return None
    openings = {opening[1] for opening in map(LEADING.match, SENTENCES.split(text)) if opening}
    return _yes_no(lead[1]) if len(openings) == 1 else None


def _yes_no(word: str) -> YesNo:
    return "yes" if word == "yes" else "no"
