"""What a judge's free text says: two scores of 1 to 10, or one grade of 0 to 1. Nothing is guessed."""

import re

BEST = 10.0
SCORE = re.compile(r"(?<![\w.])(\d+(?:\.\d+)?)(?:\s*/\s*10(?![\d.]))?(?![\w.]*\d)")
NAMED = re.compile(r"Assistant\s+[12]\s*[:：]", re.IGNORECASE)
GRADE = re.compile(r"(?<![\w.-])(\d(?:\.\d+)?|\.\d+)(?![\w]|\.\d)")


def parse_pair_strictly(review: str) -> tuple[float, float] | None:
    """Return the two scores if the first line is nothing but two numbers with one space between them (LLaVA's rule)."""
    words = review.split("\n", maxsplit=1)[0].replace(",", " ").split(" ")
    try:
        return (float(words[0]), float(words[1])) if len(words) == 2 else None
    except ValueError:
        return None


def parse_pair(review: str) -> tuple[float, float] | None:
    """Return the two scores of 1 to 10 on the first line that has any (on two lines, if each names its assistant)."""
    lines = _spoken_lines(review)
    if len(lines) > 1 and all(NAMED.match(line) for line in lines[:2]):
        lines = [" ".join(lines[:2])]
    found = _scores(lines[0]) if lines else []
    return (found[0], found[1]) if len(found) == 2 else None


def parse_score(review: str) -> float | None:
    """Return the only score of 1 to 10 on the first line that is not empty."""
    lines = _spoken_lines(review)
    found = _scores(lines[0]) if lines else []
    return found[0] if len(found) == 1 else None


def parse_first_word(reply: str) -> float | None:
    """Return the number that is the reply's first word, if it is from 0 to 1."""
    try:
        grade = float(reply.split()[0])
    except (ValueError, IndexError):
        return None
    return grade if 0 <= grade <= 1 else None


def parse_grade(reply: str) -> float | None:
    """Return the only number in the reply, if it is from 0 to 1."""
    found = GRADE.findall(reply)
    return float(found[0]) if len(found) == 1 and float(found[0]) <= 1 else None


def _spoken_lines(review: str) -> list[str]:
    lines = [line.replace("*", "").strip() for line in review.splitlines()]
    return [line for line in lines if line]


def _scores(line: str) -> list[float]:
    """Return a line's numbers, or none if one of them is not from 1 to 10."""
    found = [float(number) for number in SCORE.findall(NAMED.sub(" ", line))]
    return found if all(1 <= number <= BEST for number in found) else []
