"""The language tools of benchmark authors' own scripts: NLTK's tagger and lemmatiser, spaCy's models.

They are no dependency of llava_ray: a rule that needs them says how to install them. Our own rules do without.
"""

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from llava_ray.errors import DataError

_NLTK = "pip install nltk && python -m nltk.downloader punkt_tab averaged_perceptron_tagger_eng wordnet"
_SIMILAR = 0.8


def describe_missing_tools(*modules: str) -> str | None:
    """Return that the first missing one of some packages is not installed, and what to do; None if all are."""
    for name in modules:
        if name not in sys.modules and importlib.util.find_spec(name) is None:
            return str(_lacking(name, _NLTK if name == "nltk" else "pip install spacy"))
    return None


def tag_nouns(text: str) -> list[str]:
    """Return the nouns of a text as AMBER's script does: NLTK's words tagged NN…, lemmatised. Raises DataError."""
    nltk = _load("nltk", _NLTK)
    try:
        tagged = nltk.pos_tag(nltk.word_tokenize(text))
        return [_lemmatise(word) for word, tag in tagged if tag.startswith("NN")]
    except LookupError as error:
        raise _lacking("NLTK's data", _NLTK) from error


def lemmatise_words(text: str) -> list[str]:
    """Return the words of a text in lower case, lemmatised as nouns by NLTK. Raises DataError."""
    nltk = _load("nltk", _NLTK)
    try:
        return [_lemmatise(word) for word in nltk.word_tokenize(text.lower())]
    except LookupError as error:
        raise _lacking("NLTK's data", _NLTK) from error


def are_similar(word: str, other: str) -> bool:
    """Return whether spaCy's vectors of two words are near each other by AMBER's threshold. Raises DataError."""
    return bool(_parse("en_core_web_lg", word).similarity(_parse("en_core_web_lg", other)) > _SIMILAR)


def tag_phrase(phrase: str) -> list[tuple[str, bool]]:
    """Return the lemmas of "a PHRASE" by spaCy, each with whether it is a noun. Raises DataError."""
    nouns = ("NN", "NNS", "NNP", "NNPS")
    return [(token.lemma_, token.tag_ in nouns) for token in _parse("en_core_web_trf", f"a {phrase}")]


@lru_cache(maxsize=100_000)
def _parse(model: str, text: str) -> Any:
    return _load_model(model)(text)


@lru_cache(maxsize=2)
def _load_model(model: str) -> Any:
    """Load a spaCy model. Raises DataError."""
    how = f"pip install spacy && python -m spacy download {model}"
    spacy = _load("spacy", how)
    try:
        return spacy.load(model)
    except OSError as error:
        raise _lacking(f"spaCy's model {model}", how) from error


@lru_cache(maxsize=100_000)
def _lemmatise(word: str) -> str:
    stem = _load("nltk.stem", _NLTK)
    return str(stem.WordNetLemmatizer().lemmatize(word))


def _load(module: str, how: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise _lacking(module.partition(".")[0], how) from error


def _lacking(what: str, how: str) -> DataError:
    return DataError(
        f"the authors' own rule needs {what}, which is not installed here: {how}; or score with --profile robust, "
        "which needs none, or give the submission file to the authors' script."
    )


def join_nouns(tagged: Sequence[tuple[str, bool]]) -> list[str]:
    """Join the nouns of a phrase that follow each other, as Object HalBench's script does."""
    found: list[list[str]] = [[]]
    for lemma, is_noun in tagged:
        if is_noun:
            found[-1].append(lemma)
        elif found[-1]:
            found.append([])
    return [" ".join(words) for words in found if words]
