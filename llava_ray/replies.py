"""Verdicts in a judge's free text: two scores of 1 to 10, one score, or one grade of 0 to 1. Nothing is guessed.

A line counts if it has the form of a verdict: nothing but scores, scores after a word such as "Scores:", or scores
with the labels of their answers, in any order. Numbers inside prose, ranges, other scales, negative numbers, and two
conflicting verdicts do not count. Reasoning (``<think>``) is removed first.
"""

import math
import re
import unicodedata
from dataclasses import dataclass, field

_MAX_SCORE = 10.0
_MAX_READ = 100_000  # characters of a reply; no verdict is that long

_NAMES = r"(?:think(?:ing)?|thoughts?|reason(?:ing)?|analysis|reflection|scratchpad|seed:think)"
_OPEN = re.compile(
    rf"<\s*{_NAMES}\s*>|\[think\]|◁think▷|<\|begin_of_thought\|>|<\|channel\|>\s*analysis\s*<\|message\|>", re.I
)
_CLOSE = re.compile(
    rf"<\s*/\s*{_NAMES}\s*>|\[/think\]|◁/think▷|<\|end_of_thought\|>|<\|channel\|>\s*final\s*<\|message\|>", re.I
)
_WRAPPING = re.compile(r"</?\s*(?:final_?)?(?:answer|output|scores?|ratings?|verdict|result|final)\s*>|<\|\w+\|>", re.I)
_FENCE = re.compile(r"^\s*(?:```|~~~)\s*[\w-]*\s*$", re.M)
_BOXED = re.compile(r"\\(?:boxed|text|mathbf)\s*\{([^{}]*)\}")
_DASHES = str.maketrans(dict.fromkeys("‐‑‒–—―−﹘﹣", "-"))
_MARKS = str.maketrans(dict.fromkeys("*`\"'“”„‘’«»$", None))
_BULLET = re.compile(r"^(?:[>#•·▪◦+\s]+|-(?=\s+\D)|\d{1,2}[.)](?=\s+[^\W\d]))+\s*")
# A statement of the scale is not a score. Only the scale to 10 is accepted.
_SCALE = re.compile(
    r"(?:\b(?:on|in|from|using|with)\s+)?(?:\b(?:a|the|an)\s+)?(?:\bscale\s*)?(?:\b(?:of|from|is|between)\s+)?"
    r"(?<![\d.])[01]\s*(?:-|to|through|\.\.\.?|(?<=between [01] )and)\s*10(?![\d.]*\d)(?:\s*(?:points?\s+)?scale\b)?"
    r"|\b10(?:\s*[- ]\s*points?)\s+scale\b"
    r"|,?\s*(?:\bwith\s+|\bwhere\s+)?\b10\s*(?:being|is|=|means?)\s+(?:the\s+)?(?:best|highest|perfect|top)\b",
    re.I,
)
_UNIT_SCALE = re.compile(
    r"(?:\bon\s+)?(?:\ba\s+)?(?:\bscale\s*)?(?:\b(?:of|from)\s+)?(?<![\d.])0(?:\.0)?\s*(?:-|to)\s*1(?:\.0)?(?![\d.]*\d)",
    re.I,
)
_OF_TEN = re.compile(r"\(? ?(?<!\d )(?<!\d)(?:out of|/) ?10 ?\)?(?![\d.]*\d)", re.I)
_WHO = r"(?:assistant|answer|response|reply|model|candidate)"
_TOKEN = re.compile(
    rf"(?P<a>\b(?:the\s+)?(?:first|1st)(?:\s+{_WHO})?(?:s\b)?|\b(?:{_WHO}|score|rating)\s*[#_-]?\s*(?:1|one)(?:s\b)?"
    rf"(?!\.?\w|\s*/)|\b{_WHO}\s+a\b|\ba(?=\s*[:=]))"
    rf"|(?P<b>\b(?:the\s+)?(?:second|2nd)(?:\s+{_WHO})?(?:s\b)?|\b(?:{_WHO}|score|rating)\s*[#_-]?\s*(?:2|two)(?:s\b)?"
    rf"(?!\.?\w|\s*/)|\b{_WHO}\s+b\b|\bb(?=\s*[:=]))"
    r"|(?P<number>(?:(?<![\w.)])[-+])?(?:\d+(?:\.\d+)*|(?<![\w.])\.\d+)"
    r"(?:\s*(?:/|out\s+of)\s*(?P<most>\d+(?:\.\d+)?)|(?P<percent>\s*%))?(?P<more>[\w%°]*))"
    r"|(?P<word>[^\W\d_][\w]*(?:-\w+)*)"
    r"|(?P<mark>\S)",
    re.I,
)
_KEYS = ("score", "scores", "rating", "ratings", "grade", "grades", "mark", "marks", "verdict", "correctness")
_FILLERS = ("the", "final", "overall", "total", "my", "two", "both", "are", "is", "here", "as", "follows", "for", "of")
_AGAIN = "actually finally correction corrected revised updated adjusted instead so in on conclusion summary reflection"
_WORDS = dict.fromkeys(_KEYS, "k") | dict.fromkeys((*_FILLERS, *_AGAIN.split(), "respectively"), "w")
_WORDS |= dict.fromkeys(("and", "vs", "versus"), ",")
_WORDS |= dict.fromkeys(("because", "since"), "-")  # where the explanation begins
_WORDS |= dict.fromkeys(["reverse", "reversed", "swapped", "opposite", "descending", "ascending"], "r")
_CODES = dict.fromkeys(",;&", ",") | dict.fromkeys(":=", ":") | dict.fromkeys("([{", "(") | dict.fromkeys(")]}", ")")
_CODES |= {"|": "|", "-": "-"} | dict.fromkeys(".!", ".")

# A line is encoded as a string of signs: S a score, N any other number, a and b the labels of the two answers, k a
# word for scores, w a word that says nothing, r one that turns the order round, x any other; , : ( ) | - . as they are.
_REST = r"(?:[.,:\-(|;)]+[^SNab]*)?$"
_LEAD = r"[w(|]*(?:k[kw(|]*(?:\(?a,?b\)?[kw(|]*)?|\(?a,?b\)?[kw(|]*)?[:\-]*"
_BARE = r"[w|(]*w(?::|(?P<weak>[\-,]*+))"  # "Final:", "Overall"
_PAIR = re.compile(
    rf"^[|(]*(?:(?P<led>(?=[^S]*[kab]){_LEAD})|{_BARE}|(?P<other>x{{1,3}}[:\-]+))?(?:\(*S[,|]*S\)*|\(S\),?\(S\))w?{_REST}"
)
_HALF = r"[kw(|]*%s[kw|]*[:\-|]*\(*S\)*"
_START = r"^[|(]*(?:[kwx]{1,3}[:,\-])?"
_IN_ORDER = re.compile(rf"{_START}{_HALF % 'a'}[.,|)]*{_HALF % 'b'}{_REST}")
_IN_REVERSE = re.compile(rf"{_START}{_HALF % 'b'}[.,|)]*{_HALF % 'a'}{_REST}")
_FIRST, _SECOND = (re.compile(rf"^[|(]*{_HALF % label}{_REST}") for label in "ab")
_SINGLE = re.compile(rf"^[|(]*(?:(?P<led>[w(|]*(?:k[kw(|]*a?[kw(|]*[:\-]*|a[:\-]+))|{_BARE})?\(*S\)*{_REST}")
_INSIDE = re.compile(r"(?:^|[.):,(|w])k:\(*S\)*(?=$|[.,)\-|(])")
_PAIR_INSIDE = re.compile(r"k[kw]*:\(*S[,|]*S\)*(?=$|[.,)\-|(])")
_BAD_LABEL = re.compile(r"[ab][kw|]*[:\-|]+\(*N\)*[.,|)]*(?:$|[ab])")


@dataclass(frozen=True)
class _Line:
    """One line of a reply: its signs and its scores."""

    signs: str
    scores: tuple[float, ...]

    @property
    def is_numeric(self) -> bool:
        """Return whether the line has numbers and no words."""
        return bool(set(self.signs) & set("SN")) and not set(self.signs) & set("abkwxr")


@dataclass
class _Verdicts:
    """All verdicts found in a reply."""

    pairs: list[tuple[float, ...]] = field(default_factory=list)
    more: list[tuple[float, ...]] = field(default_factory=list)
    """Possible verdicts that do not count alone: one that differs makes the reply ambiguous."""
    first: set[float] = field(default_factory=set)
    second: set[float] = field(default_factory=set)


def remove_reasoning(reply: str) -> str | None:
    """Return a reply without its reasoning; None where the reasoning does not end."""
    text = reply[:_MAX_READ]
    while (close := _CLOSE.search(text)) is not None:
        text = text[close.end() :]
    return None if _OPEN.search(text) or len(reply) > _MAX_READ else text.strip()


def parse_pair_strictly(review: str) -> tuple[float, float] | None:
    """Return the two scores if the first line is nothing but two numbers with one space between them (LLaVA's rule)."""
    words = review.split("\n", maxsplit=1)[0].replace(",", " ").split(" ")
    try:
        pair = (float(words[0]), float(words[1])) if len(words) == 2 else None
    except ValueError:
        return None
    return pair if pair and all(map(math.isfinite, pair)) else None


def parse_pair(review: str) -> tuple[float, float] | None:
    """Return the scores (1 to 10) of the first and the second answer, if the reply gives exactly these."""
    lines = _read(review, 1.0, _MAX_SCORE)
    verdicts = _Verdicts()
    if lines is None or any(_BAD_LABEL.search(line.signs) or _is_reversed(line) for line in lines):
        return None
    quiet = True
    for line in lines:
        found = _PAIR.match(line.signs)
        if found and len(line.scores) == 2:
            if line.is_numeric and not quiet and not verdicts.pairs:
                return None
            (verdicts.pairs if _is_verdict(found, quiet) else verdicts.more).append(line.scores)
        elif line.is_numeric and not verdicts.pairs:
            return None
        elif _PAIR_INSIDE.search(line.signs) and len(line.scores) == 2:
            verdicts.more.append(line.scores)
        _add_labelled(line, verdicts)
        quiet = quiet and _is_quiet(line)
    if len(verdicts.first) == len(verdicts.second) == 1:
        verdicts.pairs.append((*verdicts.first, *verdicts.second))
    different = {*verdicts.pairs, *verdicts.more}
    return (verdicts.pairs[0][0], verdicts.pairs[0][1]) if verdicts.pairs and len(different) == 1 else None


def parse_score(review: str) -> float | None:
    """Return the score (1 to 10), if the reply gives exactly one."""
    return _only(_read(review, 1.0, _MAX_SCORE))


def parse_first_word(reply: str) -> float | None:
    """Return the number that is the reply's first word, if it is from 0 to 1."""
    try:
        grade = float(reply.split()[0])
    except (ValueError, IndexError):
        return None
    return grade if 0 <= grade <= 1 else None


def parse_grade(reply: str) -> float | None:
    """Return the grade (0 to 1), if the reply gives exactly one."""
    return _only(_read(reply, 0.0, 1.0))


def _is_verdict(found: re.Match[str], quiet: bool) -> bool:
    """Return whether a line is a verdict by itself: by a word for scores, or as the first line with numbers.

    "Overall 8 9", or "Final: 8 9" after other numbers, is not one; but if it differs from the verdict, the reply is
    ambiguous.
    """
    groups = found.groupdict()
    return bool(groups["led"]) or (quiet and groups["weak"] is None and not groups.get("other"))


def _only(lines: list[_Line] | None) -> float | None:
    """Return the single score that all lines agree on, None where there is none or they differ."""
    verdicts: set[float] = set()
    more: set[float] = set()
    quiet = True
    for line in lines or ():
        found = _SINGLE.match(line.signs)
        if found and len(line.scores) == 1:
            if line.is_numeric and not quiet and not verdicts:
                return None
            (verdicts if _is_verdict(found, quiet) else more).add(line.scores[0])
        elif line.is_numeric and not verdicts:
            return None
        elif len(_INSIDE.findall(line.signs)) == 1 == len(line.scores) and "N" not in line.signs:
            verdicts.add(line.scores[0])
        quiet = quiet and _is_quiet(line)
    return verdicts.pop() if verdicts and len(verdicts | more) == 1 else None


def _read(reply: str, least: float, most: float) -> list[_Line] | None:
    """Return the reply's lines that are not empty; None where its reasoning does not end."""
    text = remove_reasoning(reply)
    if text is None:
        return None
    text = unicodedata.normalize("NFKC", text).translate(_DASHES)
    text = "".join(letter for letter in text if unicodedata.category(letter) != "Cf")
    text = re.sub(r"\bvs\.", "vs", text, flags=re.I)
    text = _BOXED.sub(r" \1 ", _FENCE.sub("", _WRAPPING.sub("\n", text)))
    lines = (_line(raw, least, most) for raw in text.splitlines())
    return [line for line in lines if re.search(r"[^.,:()|\-]", line.signs)]


def _line(raw: str, least: float, most: float) -> _Line:
    text = re.sub(r"(?<!\w)_+|_+(?!\w)", "", raw.translate(_MARKS))
    text = _BULLET.sub("", " ".join(text.split()))
    text = " ".join((_SCALE if most == _MAX_SCORE else _UNIT_SCALE).sub(" ", text).split())
    if most == _MAX_SCORE:
        text = _OF_TEN.sub(" ", text)
    signs, scores = [], []
    for token in _TOKEN.finditer(text):
        sign = _sign(token, least, most)
        signs.append(sign)
        if sign == "S":
            scores.append(float(re.match(r"[\d.]+", token["number"])[0]))  # type: ignore[index]
    return _Line("".join(signs).replace("()", ""), tuple(scores))


def _sign(token: re.Match[str], least: float, most: float) -> str:
    if token["number"]:
        return "S" if _is_score(token, least, most) else "N"
    if token["word"]:
        return _WORDS.get(token["word"].casefold(), "x")
    return token.lastgroup or "x" if token["a"] or token["b"] else _CODES.get(token["mark"], "x")


def _is_score(token: re.Match[str], least: float, most: float) -> bool:
    """Return whether a number is a score of the scale, alone or followed by the scale's maximum ("8/10")."""
    try:
        value = float(re.match(r"[-+\d.]+", token["number"])[0])  # type: ignore[index]
    except ValueError:  # 8.5.1
        return False
    plain = token["number"][0] not in "+-" and not token["more"] and not token["percent"]
    return plain and least <= value <= most and (token["most"] is None or float(token["most"]) == most)


def _is_quiet(line: _Line) -> bool:
    """Return whether a line before a verdict only introduces it: no numbers, no answer named out of order."""
    labels = [sign for sign in line.signs if sign in "ab"]
    return not set(line.signs) & set("SNr") and labels[:1] != ["b"]


def _is_reversed(line: _Line) -> bool:
    """Return whether a line is a legend that names the second answer first."""
    return bool(re.fullmatch(r"[kw,|():.]*b[kw,|()\-]*a[kw,|():.]*", line.signs))


def _add_labelled(line: _Line, verdicts: _Verdicts) -> None:
    """Record the scores of a line that labels its answers."""
    if _IN_ORDER.match(line.signs):
        verdicts.first.add(line.scores[0])
        verdicts.second.add(line.scores[1])
    elif _IN_REVERSE.match(line.signs):
        verdicts.second.add(line.scores[0])
        verdicts.first.add(line.scores[1])
    elif _FIRST.match(line.signs):
        verdicts.first.add(line.scores[0])
    elif _SECOND.match(line.signs):
        verdicts.second.add(line.scores[0])
