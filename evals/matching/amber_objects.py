"""Counting of AMBER's objects in a description: hallucinated, covered and imagined ones."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from evals.matching.object_counts import ObjectCounts
from evals.matching.object_words import split_words, to_singular

_AMBIGUOUS = re.compile("can|leave|hot|watch|sound|support|switch|note|lock|drink|drawing|painting|sailing|file|ring")
"""Words that are often no noun: they count in the plural, or right after one of ``_LEADS``."""
_LEADS = re.compile(
    "an?|the|this|that|these|those|its|his|her|their|our|my|your|some|any|each|every|another|one|two|three|four|five|"
    "six|seven|eight|nine|ten|several|many|few|with"
)
_Fits = Callable[[str, str], bool]


@dataclass(frozen=True)
class AmberWords:
    """AMBER's vocabulary: words that go with each object, and safe words, which are never hallucinated."""

    related: Mapping[str, Sequence[str]]
    safe: frozenset[str]

    @cached_property
    def vocabulary(self) -> frozenset[str]:
        """Return all objects and the words that go with them: only these count."""
        return frozenset(word for name, words in self.related.items() for word in (name, *words))


def find_plain_nouns(text: str, vocabulary: frozenset[str]) -> list[str]:
    """Return the words of the vocabulary in a text, singular, by our own rule, which needs no tagger."""
    words = split_words(text, literally=False)
    by_case = {word.lower(): word for word in vocabulary}
    found = []
    for before, word in zip(["", *words], words, strict=False):
        name = word if word in by_case else to_singular(word)
        doubtful = name == word and _AMBIGUOUS.fullmatch(name) and not _LEADS.fullmatch(before)
        if name in by_case and not doubtful:
            found.append(by_case[name])
    return found


def count_amber_objects(
    nouns: Sequence[str], truth: Sequence[str], imagined: Sequence[str], words: AmberWords, similar: _Fits
) -> ObjectCounts:
    """Count nouns against the objects that are there and those that people would imagine beside.

    A noun of the vocabulary is right if it is an object, a word that goes with one, similar to either, or a safe word.
    It covers the first object it fits; words that go with objects are looked through before the objects themselves.
    """
    there, expected = _with_related(truth, words), _with_related(imagined, words)
    known = [noun for noun in nouns if noun in words.vocabulary]
    wrong: list[str] = []
    covered: set[int | None] = set()
    dreamt: set[int | None] = set()
    for noun in known:
        if noun in words.safe:
            continue
        place = _place_of(noun, there, _same)
        if place is None:
            dreamt |= {_place_of(noun, expected, _same), _place_of(noun, expected, similar)}
            place = _place_of(noun, there, similar)
        if place is None:
            wrong.append(noun)
        covered.add(place)
    num_covered, num_dreamt = len(covered - {None}), len(dreamt - {None})
    return ObjectCounts(len(known), tuple(wrong), num_covered, len(truth), num_dreamt, len(imagined))


def _with_related(objects: Sequence[str], words: AmberWords) -> list[tuple[str, int]]:
    """Return the words that go with each object, then the objects, each with the object's place."""
    related = [(word, place) for place, name in enumerate(objects) for word in words.related[name]]
    return [*related, *((name, place) for place, name in enumerate(objects))]


def _same(noun: str, word: str) -> bool:
    return noun == word


def _place_of(noun: str, words: Sequence[tuple[str, int]], fits: _Fits) -> int | None:
    return next((place for word, place in words if fits(noun, word)), None)
