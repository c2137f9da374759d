"""Option texts in an answer: the one it equals, and those it names."""

import re
from collections.abc import Hashable, Sequence

from evals.benchmark import LETTERS
from evals.matching.plain_text import to_plain_text
from evals.matching.quantities import whole_quantity

_FIRST_STAND_IN = 0xE000  # private characters, which no plain text holds
STAND_IN = "[\ue000-\uf8ff]"
_MARKS_AROUND = " \n.,;:!?\"'`*()[]{}。、"
_ARTICLE = re.compile(r"(?:an?|the) (?!and\b|or\b)(?=\S{2})", re.IGNORECASE)
_NOTHING = ("", "nan")


def equal_options(text: str, options: Sequence[str]) -> set[str]:
    """Return the letters of options with this text, ignoring case, surrounding marks and articles; 5 is five."""
    key_of_text = _key(text)
    return {
        letter
        for letter, option in zip(LETTERS, options, strict=False)
        if (key := _key(to_plain_text(option))) == key_of_text and key not in _NOTHING
    }


def with_stand_ins(text: str, options: Sequence[str]) -> str:
    """Replace each option's text by one private character, so that its letters are not parsed.

    "red car" names no "car": of two texts, one within the other, the outer one is meant.
    """
    found = []
    flat = " ".join(text.casefold().split())
    for number, option in enumerate(options[: len(LETTERS)]):
        words = _bare(to_plain_text(option))
        if words.lower() in _NOTHING or (len(words) == 1 and words.isalpha()) or words.casefold() not in flat:
            continue
        found += [(*match.span(), number) for match in _pattern(words).finditer(text)]
    outer = [
        one
        for one in found
        if not any(other[0] <= one[0] and one[1] <= other[1] and other[:2] != one[:2] for other in found)
    ]
    pieces, end = [], 0
    for start, stop, number in sorted(outer):
        pieces += [text[end:start] if start >= end else "", chr(_FIRST_STAND_IN + number)]
        end = max(end, stop)
    return "".join(pieces) + text[end:]


def named_options(text: str) -> set[str]:
    """Return the letters of the options that a text with stand-ins names."""
    return {letter_of(char) for char in re.findall(STAND_IN, text)}


def letter_of(stand_in: str) -> str:
    """Return the letter of a private character's option."""
    return LETTERS[ord(stand_in) - _FIRST_STAND_IN]


def _pattern(words: str) -> re.Pattern[str]:
    # "10" is neither in "10.5" nor in "-10", "1,10" or "10%".
    before = r"(?<![\w.,/-])" if words[0].isdigit() else r"(?<!\w)"
    after = r"(?![\w%°]|[.,:/]\d|-\d| %)" if words[-1].isdigit() else r"(?!\w)"
    spaced = r"\s+".join(map(re.escape, words.split()))
    return re.compile(before + spaced + after, re.IGNORECASE)


def _bare(text: str) -> str:
    words = text.strip(_MARKS_AROUND) or text.strip()
    # Before its lines are joined: "A" on a line of its own is no article.
    return " ".join(_ARTICLE.sub("", words, count=1).split()) if _ARTICLE.match(words) else " ".join(words.split())


def _key(text: str) -> Hashable:
    words = _bare(text).casefold()
    return whole_quantity(words) or words
