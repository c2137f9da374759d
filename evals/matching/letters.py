"""Parsing of option letters: LLaVA's rule, the rules of several benchmarks' authors, and ours."""

import re
from collections.abc import Sequence

from evals.benchmark import LETTERS
from evals.matching.option_reading import OptionReading

_MARKS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
_LAST_TOKENS = 4
_MIN_WORDS_FOR_TEXT = 5

# A letter alone, not part of a word or a contraction ("A's"); Chinese characters beside it do not matter.
_ALONE = r"(?<![A-Za-z0-9'’])([A-Z])(?![A-Za-z0-9'’])"
_DECLARED = re.compile(
    r"(?:answer|option|choice)(?:\s+(?:is|would be|should be|to the question is))?\s*(?:option\s*)?[:：]?\s*"
    r"[(\[\"'*]*" + _ALONE + r"|(?:答案|应该|正确的)(?:选项)?[是为选]?\s*[:：]?\s*[(（]?" + _ALONE,
    re.IGNORECASE,
)
# "A cat" is a cat; "A is right" is the option.
_ARTICLE = re.compile(r"(?<![A-Za-z0-9'’])A (?=[a-z])(?!(?:is|was|because|and|or|seems|since|as|not)\b)")


def parse_science_qa(answer: str) -> str | None:
    """Parse by LLaVA's rule: the bare letter, "X. " in front, or exactly one "The answer is X" with more after it."""
    if answer in tuple("ABCDE"):
        return answer
    if answer[:1] in tuple("ABCDE") and answer[1:3] == ". ":
        return answer[0]
    return parse_the_answer_is(answer)


def parse_the_answer_is(answer: str) -> str | None:
    """Return the letter of the only "The answer is X" with a character after it."""
    found = re.findall(r"The answer is ([A-Z]).", answer)
    return found[0] if len(found) == 1 else None


def parse_mmbench(answer: str, options: Sequence[str]) -> str | None:
    """Parse by MMBench's rule: "the answer is X", one lone letter near the end, or the one option contained."""
    letters = LETTERS[: len(options)]
    declared = {letter for letter in _declared(answer) if letter in letters}
    if len(declared) == 1:
        return declared.pop()
    tokens = answer.translate(_MARKS).split()
    found = [letter for letter in letters if letter in tokens]
    if len(found) == 1 and tokens.index(found[0]) >= len(tokens) - _LAST_TOKENS:
        return found[0]
    text = answer.lower()
    contained = [letter for letter, option in zip(letters, options, strict=True) if option.lower() in text]
    return contained[0] if len(contained) == 1 else None


def parse_mmmu(answer: str, options: Sequence[str]) -> str | None:
    """Parse by MMMU's rule: "(X)", "X ", "X.", an option's text; the last one wins. None where it would guess."""
    text = answer
    for mark in ",.!?;:'":
        text = text.strip(mark)
    text = f" {text} "
    letters = LETTERS[: len(options)]
    for form in ("({})", "{} ", "{}."):
        places = {letter: text.rfind(form.format(letter)) for letter in letters}
        if found := [letter for letter in letters if places[letter] >= 0]:
            # Whatever form was found, places of several are compared as "X " is written (in "X." none is found).
            spot = places if form == "({})" else {letter: text.rfind(f" {letter} ") for letter in letters}
            return max(found, key=lambda letter: spot[letter])
    if len(text.split()) > _MIN_WORDS_FOR_TEXT:
        lowered = text.lower()
        spots = {letter: lowered.rfind(option.lower()) for letter, option in zip(letters, options, strict=True)}
        if max(spots.values()) >= 0:
            return max(spots, key=lambda letter: spots[letter])
    return None


def parse_mmmu_pro(answer: str, options: Sequence[str]) -> str | None:
    """Parse by MMMU-Pro's rule: the one option letter after the last "Answer:", else MMMU's rule."""
    _, label, tail = answer.rpartition("Answer:")
    found = [letter for letter in LETTERS[: len(options)] if letter in tail] if label else []
    return found[0] if len(found) == 1 else parse_mmmu(answer, options)


def parse_letter(answer: str, options: Sequence[str]) -> str | None:
    """Parse the option that an answer names unambiguously, by its letter or text; None in doubt.

    The text of exactly one option, or a letter alone, is that option; a letter that is another option's text is in
    doubt. Else the first of these that finds something decides: a label with nothing but an option's text (its own, or
    "B. cat" with a full stop; "B: cat" is in doubt); "the answer is X"; a label in front that no other letter, and no
    text as its own, contradicts; a letter alone that no option's text contradicts; the text of one option. A letter
    within an option's text, an article ("A cat"), a name ("vitamin C") is no label, and what is spoken against ("not
    B") is no answer.
    """
    return OptionReading(answer, options).letter()


def _declared(text: str) -> list[str]:
    # The words in front may be in any case, the letter may not: "the answer is a bear" declares nothing.
    found = [match[1] or match[2] for match in _DECLARED.finditer(_ARTICLE.sub("a ", text))]
    return [letter for letter in found if letter.isupper()]
