"""Replacement of object words: a rejected answer that names what is not in the image."""

import itertools
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from evals.files import read_utf8
from llava_ray.errors import DataError

_WORD = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*")
_BEFORE_OBJECTS = frozenset({"a", "an", "the", "of", "with", "two", "three", "four", "several", "some", "many"})
_NO_OBJECTS_LISTED = (
    "a an the this that these those there here it its he she his her they them their and or but not no yes is are was "
    "were be been has have had do does of in on at by to from with without for as than then so very more most some any "
    "one two three four other same first second left right top bottom front back middle side image picture photo scene "
    "background foreground large small big little few lot number group pair kind type which what who how beside near "
    "under over behind between"
)
_NO_OBJECTS = frozenset(_NO_OBJECTS_LISTED.split())
_MIN_LETTERS = 3
_MOST_IN_PHRASE = 3
_MOST_WORDS = 5000


@dataclass(frozen=True)
class WordGroups:
    """Words of one or more kinds; a word is replaced by one of its own kind."""

    groups: tuple[tuple[str, ...], ...]

    def others(self, word: str, excluded: Iterable[str]) -> list[str]:
        """Return the words that may replace a word."""
        banned = {word.lower(), *(one.lower() for one in excluded)}
        kinds = [group for group in self.groups if word.lower() in group]
        return sorted({other for group in kinds for other in group} - banned)


def read_words(path: Path) -> WordGroups:
    """Read a file of words: one kind a line with commas, or one word a line, all of one kind. Raises DataError."""
    lines = [line.strip().lower() for line in read_utf8(path).splitlines() if line.strip() and line[0] != "#"]
    listed = [[word.strip() for word in line.split(",") if word.strip()] for line in lines]
    single = [words[0] for words in listed if len(words) == 1]
    groups = [tuple(dict.fromkeys(words)) for words in (*(some for some in listed if len(some) > 1), single)]
    if not any(len(group) > 1 for group in groups):
        raise DataError(f"{path} (preferences.words) names no two words of a kind: give one word a line")
    return WordGroups(tuple(group for group in groups if len(group) > 1))


def find_words(answers: Sequence[str]) -> WordGroups:
    """Return the object words of answers: whole answers of one word, and words between an article and a function word.

    Raises DataError where there are no two of them.
    """
    alone: dict[str, None] = {}
    nouns: Counter[str] = Counter()
    last: Counter[str] = Counter()
    for answer in answers:
        words = [word.lower() for word in _WORD.findall(answer)]
        if len(words) == 1 and words[0] not in ("yes", "no"):
            alone[words[0]] = None
        for phrase in _phrases(answer):
            (nouns if len(phrase) == 1 else last)[phrase[-1]] += 1
    counted = nouns if len(nouns) > 1 else nouns + last
    objects = [word for word, _ in sorted(counted.items(), key=lambda pair: (-pair[1], pair[0]))[:_MOST_WORDS]]
    groups = [group for group in (tuple(sorted(alone)), tuple(sorted(objects))) if len(group) > 1]
    if not groups:
        raise DataError(
            "preferences.rule = 'replaced_words': the data's answers name no two objects; give a list of words "
            "(preferences.words)"
        )
    return WordGroups(tuple(groups))


def _phrases(answer: str) -> list[list[str]]:
    """Return the words between each article or number and the next function word or mark: "a red bus and" → red bus."""
    phrases = []
    for piece in re.split(r"[^\w\s'’-]+", answer.lower()):
        words = _WORD.findall(piece)
        for place, before in enumerate(words):
            if before in _BEFORE_OBJECTS:
                run = list(itertools.takewhile(lambda word: word not in _NO_OBJECTS, words[place + 1 :]))
                if run and len(run) <= _MOST_IN_PHRASE and len(run[-1]) >= _MIN_LETTERS:
                    phrases.append(run)
    return phrases


def replace_words(text: str, words: WordGroups, most: int, seed: int, avoided: str = "") -> str | None:
    """Replace up to ``most`` object words of a text, chosen by the seed; None if it has none that can be.

    A word becomes another of its kind that neither the text nor ``avoided`` has, everywhere it stands; its case stays
    and the article before it fits.
    """
    drawn = random.Random(seed)
    known = {word.lower() for word in _WORD.findall(f"{text} {avoided}")}
    places: Mapping[str, list[str]] = _candidates(text, words, known)
    if not places:
        return None
    targets = drawn.sample(sorted(places), min(most, len(places)))
    replaced: dict[str, str] = {}
    for target in sorted(targets):
        others = [other for other in places[target] if other not in replaced.values()]
        if others:
            replaced[target] = drawn.choice(others)
    return _substitute(text, replaced)


def _candidates(text: str, words: WordGroups, known: set[str]) -> dict[str, list[str]]:
    """Return the words of a text that can be replaced, each with what may stand in its place."""
    found: dict[str, list[str]] = defaultdict(list)
    lower = text.lower()
    for group in words.groups:
        for word in group:
            if word in lower and re.search(rf"\b{re.escape(word)}\b", lower):
                found[word] = words.others(word, known)
    return {word: others for word, others in found.items() if others}


def _substitute(text: str, replaced: Mapping[str, str]) -> str:
    listed = "|".join(re.escape(word) for word in sorted(replaced, key=len, reverse=True))
    pattern = re.compile(rf"(?:\b(an?)(\s+))?\b({listed})\b", re.IGNORECASE)

    def put(match: re.Match[str]) -> str:
        article, gap, word = match.groups()
        new = replaced[word.lower()]
        new = new.upper() if word.isupper() and len(word) > 1 else new.capitalize() if word[0].isupper() else new
        if not article:
            return new
        fitting = "an" if new[0].lower() in "aeiou" else "a"
        return f"{fitting.capitalize() if article[0].isupper() else fitting}{gap}{new}"

    return pattern.sub(put, text)
