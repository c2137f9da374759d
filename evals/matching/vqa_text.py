"""Short answers against ten human ones: two normalisers (EvalAI's, the official script's) and soft accuracy.

Both are kept with their quirks, since published numbers were computed with them: "none" is 0, the text may become
empty ("a"), and at most 32 periods go.
"""

import re
from collections.abc import Callable, Sequence

from evals.matching.plain_text import to_plain_text, without_label

_WORDS = re.compile(r"\S+")
_NUMBERS = {
    word: str(number)
    for number, word in enumerate(_WORDS.findall("zero one two three four five six seven eight nine ten"))
}
_NUMBERS["none"] = "0"
_ARTICLES = ("a", "an", "the")
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_DIGIT_COMMA_DIGIT = re.compile(r"\d,+\d")
_PERIOD = re.compile(r"\.(?!\d)")
_MINUS = re.compile(r"(?<![\w)])-(?=\.?\d)")
_MAX_PERIODS = 32  # the originals pass re.UNICODE, which is 32, where the number of replacements belongs

# Words in full; the table maps each without one of its apostrophes (or without both) to the word.
_CONTRACTED = _WORDS.findall("""
ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's I'm I've
isn't it'd it'll ma'am mightn't might've mustn't must've needn't not've o'clock oughtn't shan't should've shouldn't
somebody'll somebody's someone'd someone'll someone's something'd something'll that's there'd there're there's they'd
they'll they're they've 'twas wasn't we've weren't what'll what're what's what've when's where'd where's where've who'd
who'll who's who've why'll why're why's won't would've wouldn't y'all you'd you'll you're you've
""")
_TWICE = _WORDS.findall("""
hadn't've he'd've I'd've it'd've mightn't've she'd've shouldn't've somebody'd've someone'd've something'd've there'd've
they'd've we'd've who'd've wouldn't've y'all'll you'd've couldn't've
""")
_CONTRACTIONS = (
    {word.replace("'", ""): word for word in _CONTRACTED}
    | {word[: word.rindex("'")] + word[word.rindex("'") + 1 :]: word for word in _TWICE}
    | {word.replace("'", "", 1): word for word in _TWICE}
    | {"ow's'at": "'ow's'at", "'ows'at": "'ow's'at", "'ow'sat": "'ow's'at", "somebody'd": "somebodyd"}
    | {"yall'd've": "y'all'd've", "y'alld've": "y'all'd've", "y'all'dve": "y'all'd've"}
)


def normalise_evalai(text: str) -> str:
    """Normalise an answer as EvalAI's processor does (LLaVA's uploads, TextVQA): commas are removed first."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return _words(_punctuation(text.replace("\n", " ").replace("\t", " ").strip()))


def normalise_official(text: str) -> str:
    """Normalise an answer as the official VQA script does: a comma between words becomes a space."""
    return _words(_punctuation(text.replace("\n", " ").replace("\t", " ").strip()))


def normalise_robust(text: str) -> str:
    """Normalise a plain text by the official rules, but keep "a" and the sign of -5."""
    text = _MINUS.sub("minus ", without_label(to_plain_text(text)).strip("'"))
    return normalise_official(text) or " ".join(_punctuation(text).lower().split())


def _soft_accuracy(answer: str, humans: Sequence[str]) -> float:
    """Compute the mean over humans of min(1, matching others / 3): 0, .3, .6, .9, 1 for 0..4 of ten."""
    same = sum(human == answer for human in humans)
    return sum(min(1.0, (same - (human == answer)) / 3) for human in humans) / len(humans)


def llava_accuracy(answer: str, humans: Sequence[str]) -> float:
    """Score as LLaVA and TextVQA do: everything through EvalAI's processor."""
    return _soft_accuracy(normalise_evalai(answer), [normalise_evalai(human) for human in humans])


def official_accuracy(answer: str, humans: Sequence[str], answer_ids: Sequence[object] | None = None) -> float:
    """Score as the official script does: raw where all humans agree, and "the other humans" are those that differ.

    Humans without ids are equal records when they said the same, so that agreement counts for nothing: a quirk of the
    script, kept here.
    """
    clean: Callable[[str], str] = normalise_official if len(set(humans)) > 1 else str
    answer = clean(answer.replace("\n", " ").replace("\t", " ").strip())
    ids = answer_ids or [None] * len(humans)
    records = [(clean(human), number) for human, number in zip(humans, ids, strict=True)]
    matches = [sum(other != record and other[0] == answer for other in records) for record in records]
    return sum(min(1.0, same / 3) for same in matches) / len(records)


def robust_accuracy(answer: str, humans: Sequence[str]) -> float:
    """Score with the official normaliser applied always; one lone human is plain equality."""
    normalised, others = normalise_robust(answer), [normalise_robust(human) for human in humans]
    return float(normalised == others[0]) if len(others) == 1 else _soft_accuracy(normalised, others)


def _punctuation(text: str) -> str:
    between_digits = _DIGIT_COMMA_DIGIT.search(text) is not None
    cleaned = text
    for mark in _PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text
        cleaned = cleaned.replace(mark, "" if beside_space or between_digits else " ")
    return _PERIOD.sub("", cleaned, count=_MAX_PERIODS)


def _words(text: str) -> str:
    words = (_NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)
