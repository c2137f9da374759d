"""Object words in a text, by a benchmark's own vocabulary: words, their singular, two words that are one.

Only words of a vocabulary matter, so that a few rules of English suffice.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

_CLITICS = re.compile(r"(?<=.)((?:'s|'re|'ve|'ll|'d|'m|n't|'){1,3})$")
_TOKENS = re.compile(r"[\w/-](?:[\w'./-]*[\w'/-])?|[^\w\s]")
_INSIDE = re.compile(r"(?<=\w)[-/.](?=\w)")
_STOPS = re.compile(r"\.{2,}|--+")
_APOSTROPHES = str.maketrans(dict.fromkeys("’‘ʼ", "'"))
_UNCHANGED = ("scissors",)
_IRREGULAR = {"people": "person", "kine": "cow", "brethren": "brother", "mice": "mouse", "oxen": "ox", "geese": "goose"}
_IRREGULAR |= {"collies": "collie", "doggies": "doggie", "cookies": "cookie", "calves": "calf", "wolves": "wolf"}
_ENDINGS = (
    (re.compile(r"children$"), "child"),
    (re.compile(r"men$"), "man"),
    (re.compile(r"^.*buses$"), "bus"),
    (re.compile(r"(?<=kni)ves$"), "fe"),
    (re.compile(r"(?<=[^aeiouy])ies$"), "y"),
    (re.compile(r"(?<=o)es$|(?<=x)es$|(?<=ch)es$|(?<=ss)es$|(?<=sh)es$"), ""),
    (re.compile(r"(?<=.)s$"), ""),
)


def split_words(text: str, *, literally: bool = True) -> list[str]:
    """Split a text into words in lower case and marks, which divide words; an ending such as 's is a mark.

    ``literally``: as NLTK does, a hyphen, slash or full stop inside a word does not split it.
    """
    if not literally:
        text = _INSIDE.sub(" ", text)
    plain = _STOPS.sub(" . ", text.lower().translate(_APOSTROPHES))
    return [part for token in _TOKENS.findall(plain) for part in _CLITICS.split(token) if part]


def to_singular(word: str) -> str:
    """Return a noun's singular as CHAIR's script finds it, which takes every other final s away, that of "bus" too."""
    if word in _UNCHANGED:
        return word
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    for ending, instead in _ENDINGS:
        if ending.search(word):
            return ending.sub(instead, word)
    return word


@dataclass(frozen=True)
class ObjectVocabulary:
    """Words for objects, each with the name of its object, and pairs of words that are read as one word."""

    objects: Mapping[str, str]
    pairs: Mapping[str, str] = field(default_factory=dict)

    def find(self, text: str, *, literally: bool) -> list[tuple[str, str]]:
        """Return the object words of a text in order, each with its object.

        ``literally``: every word is made singular, as CHAIR's script does, so that "bus" and "tennis racket" are lost;
        otherwise a word that the vocabulary knows stays as it is.
        """
        words = split_words(text, literally=literally)
        return self.name(self.join_pairs([to_singular(word) if literally else self.singular(word) for word in words]))

    def singular(self, word: str) -> str:
        """Return a word's singular; a word that the vocabulary knows stays as it is."""
        return word if word in self.words else to_singular(word)

    def name(self, words: Iterable[str]) -> list[tuple[str, str]]:
        """Return the object words among singular words, each with its object; the seat of a toilet is none."""
        known = list(words)
        if "toilet" in known and "seat" in known:
            known = [word for word in known if word != "seat"]
        return [(word, self.objects[word]) for word in known if word in self.objects]

    def join_pairs(self, words: Sequence[str], *, alone: bool = True) -> list[str]:
        """Replace pairs of words from the left; ``alone``: keep the words between them."""
        found, index = [], 0
        while index < len(words):
            pair = " ".join(words[index : index + 2])
            if pair in self.pairs:
                found.append(self.pairs[pair])
                index += 2
                continue
            if alone:
                found.append(words[index])
            index += 1
        return found

    @cached_property
    def words(self) -> frozenset[str]:
        """Return every single word of the vocabulary, those inside of pairs included."""
        return frozenset(word for name in (*self.objects, *self.pairs) for word in name.split(" "))
