"""The option that an answer names: letters and option texts, checked against each other."""

import re
from collections.abc import Sequence

from evals.benchmark import LETTERS
from evals.matching.option_texts import STAND_IN, equal_options, letter_of, named_options, with_stand_ins
from evals.matching.plain_text import to_plain_text, without_lead_in

# One letter as the whole answer, by itself or after "option".
_WHOLE = re.compile(
    r"(?:(?:option|choice|选项?)\s*)?[(\[{<\"']{0,4}([A-Za-z])[)\]}>\"']{0,4}\s*[.:,;!。、]?", re.IGNORECASE
)
# A letter that is no part of a word, an abbreviation ("U.S."), a unit ("25 °C") or a name ("C++", "C-shaped").
_ALONE = (
    r"(?<![A-Za-z0-9'°])(?<![A-Za-z0-9]-)(?<![A-Za-z]\.)(?<!\d )(?<!° )([A-Z])"
    r"(?![A-Za-z0-9'#*])(?!\+)(?!-\w)(?!\.[A-Z](?![a-z]))"
)
_ASIDE = r"(?:to (?:the|this) question |here )?"
_IS = rf"\s*{_ASIDE}(?:is|would be|should be|must be|=|:)[:=]?\s*"
_OPEN, _CLOSE = r"[(\[{<\"']{0,4}", r"[)\]}>\"']{0,4}"
_DECLARED = re.compile(
    rf"(?i:\banswer(?:{_IS}|\s+)|\b(?:option|choice){_IS})(?i:(?:option|choice)\s+)?{_OPEN}{_ALONE}"
    rf"|(?:答案|应该|正确的)(?:选项)?[是为选]?\s*:?\s*{_OPEN}{_ALONE}"
    rf"|(?i:\b(?:answer|option|choice){_IS}(?:(?:option|choice)\s+)?){_OPEN}([a-z])(?={_CLOSE}[.,;!]?\s*(?:\n|$)|[)\].:]\s)"
)
_ALSO = re.compile(
    rf"{_CLOSE}\s*(?:[,/&]|\b(?:or|and|nor)\b)\s*(?:(?:maybe|possibly|perhaps|option|also|even|either) )*"
    rf"{_OPEN}{_ALONE}"
)
# An option's text as a label's own: "A: dog", "A, which is a dog"; in "B: The cat is too small" it is a sentence's.
_THAT_IS = r"(?i:(?:(?:i\.? ?e\.?|that is|this is|which is|it is|it's|namely),?\s+)?(?:an?\s+)?)"
_TEXT = rf"{_THAT_IS}(?:({STAND_IN})|(?i:the)\s+({STAND_IN})(?!\s+[^\W\d]))"
_STOPPED = re.compile(rf"{_OPEN}[A-Z]{_CLOSE}\s*\.")
_TEXT_FOLLOWS = re.compile(rf"{_CLOSE}\s*(?:[:,;、)]|- )?\s*{_TEXT}")
_WITH_TEXT = re.compile(
    rf"(?:(?i:option|choice)\s+)?{_OPEN}([A-Z]){_CLOSE}(?:\s*[.:,;、)]|\s+-?|(?<=[)\]}}>]))\s*(\S.*)", re.DOTALL
)
_DENIED = re.compile(r"\s*(?:is|are|was)?(?: not\b|n't\b| (?:wrong|incorrect|false)\b)")
_LABEL = re.compile(
    rf"{_OPEN}([A-Z])(?:{_CLOSE}\s*[.:,、)]|{_CLOSE} - |[)\]}}]|\s*\n|(?=\s+(?:because|since|as)\b))\s*(?=\S)"
)
_LOWER_LABEL = re.compile(r"^[(\[]?[a-z](?:[)\]][.:]?|[.:])(?=\s)")
_OWN_TEXT = re.compile(rf"(?<!\w){_OPEN}([A-Z]){_CLOSE}\s*[.:,;、)-]*\s*{_TEXT}")
# "A cat" is a cat, "I think" is somebody; "A is right" is the option.
_ARTICLE = re.compile(rf"(?<![A-Za-z0-9'])A (?=[a-z]|{STAND_IN})(?!(?:is|was|because|and|or|seems|since|as|not|but)\b)")
_PRONOUN = re.compile(r"(?<![A-Za-z0-9'])I (?=[a-z])(?!(?:is|because|or)\b)")
_NOT_THIS = re.compile(rf"[,;]?\s+(?:and |but )?not (?:an? |the |option )?(?:[A-Z]|{STAND_IN})(?=\s*(?:[.,;:!?)\n]|$))")
_NEGATION = re.compile(
    r"\b(?:not|no(?! doubt)|never|neither|nor|none|cannot|except|excluding|anything but|incorrect|wrong|false"
    r"|rather than|instead of|unlike|other than)\b|n't\b|不|非|除了",
    re.IGNORECASE,
)
_CLAUSE = re.compile(r"[.;:,!?\n]|\b(?:because|since|so|though|although|while)\b")
# What may stand directly before a letter that is an answer; after any other word it is a name ("vitamin C").
_BEFORE = re.compile(
    r"(?:^|[^\w\s'][\s\"'(\[]*|\n\s*|\b(?:option|choice|answer|letter|is|be|are|was|choose|chose|pick|select|with|say|think"
    r"|guess|mean|means|as|to|for|by|so|hence|thus|therefore|maybe|perhaps|prefer|and|or|both|either|neither|nor|not|than"
    r"|correct|right|of|the|that|but|\w+ly|\w*'s|[^\W\dA-Za-z_]+)[\s\"'(\[]*)$",
    re.IGNORECASE,
)
# What may follow a letter that is an answer; "B cells" are no option.
_AFTER = re.compile(
    rf"\s*(?:$|[^\w\s]|{STAND_IN}|[^\x00-\x7f]|(?:because|since|as|is|was|are|has|looks?|seems?|appears?|would|should"
    r"|must|might|may|could|can|fits?|shows?|matches|and|or|but|not|by|for|due|which|it|the|an?|there|this|that|in|on|with"
    r"|then|here)\b)|\s*\n",
    re.IGNORECASE,
)
_NEAR = 40


class OptionReading:
    """An answer with its options."""

    def __init__(self, answer: str, options: Sequence[str]) -> None:
        """Prepare the text: replace option texts by single characters, and "A" as an article."""
        self.options = options
        self.letters = LETTERS[: len(options)]
        self.text = to_plain_text(answer)
        named = _LOWER_LABEL.sub(lambda match: match[0].upper(), with_stand_ins(self.text, options), count=1)
        self.named = _without_denied(_PRONOUN.sub("i ", _ARTICLE.sub("a ", named)))

    def letter(self) -> str | None:
        """Return the letter, or None."""
        stated = without_lead_in(self.text)
        whole, equal = _WHOLE.fullmatch(stated), equal_options(stated, self.options)
        label = {whole[1].upper()} & set(self.letters) if whole else set()
        if label or equal:
            # If "A" is the text of another option than A, it is ambiguous.
            return next(iter(label | equal)) if len(label | equal) == 1 else None
        labelled = _WITH_TEXT.fullmatch(stated)
        texts = equal_options(labelled[2], self.options) if labelled else set()
        if labelled and texts:
            # "B. cat" is B whatever B says, as it is to LLaVA's rule and several authors'; "B: cat" is ambiguous.
            return labelled[1] if labelled[1] in texts or _STOPPED.match(stated) else None
        return self._within()

    def _within(self) -> str | None:
        declared = self._declared()
        if declared:
            return declared.pop() if len(declared) == 1 else None
        own = [(match[1], letter_of(match[2] or match[3])) for match in _OWN_TEXT.finditer(self.named)]
        agreeing = {one for one, other in own if one == other}
        front = _LABEL.match(self.named)
        if len(agreeing) == 1 and front and own[0][0] in agreeing:
            return agreeing.pop()
        rival = None if _STOPPED.match(self.named) else _OWN_TEXT.match(self.named)
        if rival and letter_of(rival[2] or rival[3]) != rival[1]:
            return None
        alone, in_doubt = self._alone()
        if front and front[1] in self.letters and set(alone) <= {front[1]}:
            return front[1]
        if alone:
            return self._single(alone)
        return None if in_doubt else self._only_named()

    def _declared(self) -> set[str]:
        """Return the letters after "the answer is"; two, or a non-option, if ambiguous."""
        found = set()
        for match in _DECLARED.finditer(self.named):
            letter = (match[1] or match[2] or match[3]).upper()
            if not _AFTER.match(self.named, match.end()):
                continue
            other, text = _ALSO.match(self.named, match.end()), _TEXT_FOLLOWS.match(self.named, match.end())
            if text and letter_of(text[1] or text[2]) != letter:
                found |= {letter, letter_of(text[1] or text[2])}
            elif _NEGATION.search(_clause(self.named, match.start())) or _DENIED.match(self.named, match.end()):
                found |= {"not", letter}
            elif letter in self.letters:
                found |= {letter, other[1]} if other and other[1] in self.letters else {letter}
        return found

    def _alone(self) -> tuple[dict[str, int], bool]:
        """Return letters that may be answers with their positions, and whether the text has others ("vitamin C")."""
        found: dict[str, int] = {}
        in_doubt = False
        for match in re.finditer(_ALONE, self.named):
            if match[1] not in self.letters:
                continue
            before = self.named[max(0, match.start() - _NEAR) : match.start()]
            if _BEFORE.search(before) and _AFTER.match(self.named, match.end()):
                found.setdefault(match[1], match.start())
            else:
                in_doubt = True
        return found, in_doubt

    def _single(self, alone: dict[str, int]) -> str | None:
        """Return the only letter, unless it is negated or another option is named."""
        (letter, place), *others = alone.items()
        clause = _clause(self.named, place) + _CLAUSE.split(self.named[place + 1 :])[0]
        named = named_options(self.named)
        if others or _NEGATION.search(clause) or not named <= {letter}:
            return None
        return letter

    def _only_named(self) -> str | None:
        """Return the only option whose text occurs, unless it is negated."""
        letters = named_options(self.named)
        places = [match.start() for match in re.finditer(STAND_IN, self.named)]
        if len(letters) != 1 or any(_NEGATION.search(_clause(self.named, place)) for place in places):
            return None
        return letters.pop()


def _without_denied(text: str) -> str:
    """Remove ", not C" from a text, if another option precedes it."""
    match = _NOT_THIS.search(text)
    if match and re.search(rf"{_ALONE}|{STAND_IN}", text[: match.start()]):
        return text[: match.start()] + text[match.end() :]
    return text


def _clause(text: str, place: int) -> str:
    return _CLAUSE.split(text[:place])[-1]
