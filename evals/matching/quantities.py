"""Parsing of the only number that a plain text states, with its sign, percentage and unit.

A range, a bound, an ordinal, a date, a time, or two numbers to choose from are not one number.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from evals.matching.number_words import digits_for_words

_SCALES = {"k": 1e3, "m": 1e6, "b": 1e9, "hundred": 1e2, "thousand": 1e3, "million": 1e6, "mn": 1e6, "billion": 1e9}
_SCALES |= {"bn": 1e9, "trillion": 1e12, "lakh": 1e5, "crore": 1e7, "dozen": 12.0}
_SCALES |= {"mln": 1e6, "mio": 1e6, "bln": 1e9, "trn": 1e12}
# What is a scale after money, and else may be one: "5 M" is five million, or 5 m; "5 mil" may be a length.
_MAYBE_SCALES = {"k": 1e3, "m": 1e6, "b": 1e9, "mm": 1e6, "mil": 1e6, "mill": 1e6, "bil": 1e9, "thou": 1e3, "tn": 1e12}
_MAYBE_SCALES |= {"cr": 1e7}
_HUNDREDTHS = "¢"
_UNITS = {
    unit: words[0]
    for words in map(
        str.split,
        (
            "mm millimeter millimeters millimetres",
            "cm centimeter centimeters centimetres",
            "m meter meters metre metres",
            "km kilometer kilometers kilometres",
            "in inch inches",
            "ft foot feet",
            "yd yard yards",
            "mi mile miles",
            "mg milligram milligrams",
            "g gram grams",
            "kg kilogram kilograms",
            "lb lbs pound pounds",
            "oz ounce ounces",
            "t ton tons tonne tonnes",
            "ml milliliter milliliters",
            "l liter liters litre litres",
            "ms millisecond milliseconds",
            "s sec secs second seconds",
            "min mins minute minutes",
            "h hr hrs hour hours",
            "day days",
            "week weeks",
            "month months",
            "year years yrs yr",
            "°c",
            "°f",
            "hz",
            "khz",
            "mhz",
            "ghz",
            "v",
            "w",
            "kw",
            "mw",
            "j",
            "kj",
            "n",
            "pa",
            "kpa",
            "mol",
            "km/h",
            "m/s",
            "mph",
            "$ dollar dollars usd",
            "€ euro euros eur",
            "£ gbp",
            "¥ yen yuan",
            "¢ cent cents pence penny",
        ),
    )
    for unit in words
}
MONEY = ("$", "€", "£", "¥", _HUNDREDTHS)
_ATTACHED = "|".join(sorted((re.escape(unit) for unit in _UNITS if unit not in ("s", "n")), key=len, reverse=True))
_NUMBER = re.compile(
    r"(?<![A-Za-z_\d.,:/^°\\])(?<![A-Za-z\d]-)(?P<sign>(?:(?<![\w)])[-+]|\b(?:minus|negative) )?)"
    r"(?:(?:US|us)?(?P<money>[$€£¥₹]) ?)?(?P<inner>-?)"
    r"(?P<body>\d{1,3} \d{1,3}/\d{1,3}|\d{1,3}(?:,\d{2,3})*,\d{3}(?:\.\d+)?|\d{1,3}(?:[ ']\d{3})+(?:\.\d+)?"
    r"|\d+/\d+|\d+(?:\.\d+)?|\.\d+)"
    r"(?P<power>[eE][+-]?\d+| ?[×x*] ?10\^[+-]?\d+|\^[+-]?\d+)?"
    r"(?:(?P<close>[kKMB]|(?(money)b|(?!)))(?![A-Za-z\d])"
    r"|(?: ?(?i:(?P<scale>hundred|thousand|million|mn|mln|mio|billion|bn|bln|trillion|trn|lakh|crore|dozen)s?)"
    r"(?![A-Za-z])))?"
    r"(?: ?(?i:(?P<percent>%|percent(?:age points?)?|per cent|pct)(?![A-Za-z])))?"
    rf"(?:(?P<unit>{_ATTACHED})(?![A-Za-z])| (?P<apart>[A-Za-z°$€£¥¢/]+))?(?:(?<=m)\^?[23])?"
    r"(?![A-Za-z_\d^]|[.,:/]\d|-\d|['/])"
)
_NOT_THIS = re.compile(
    r"(?:\b(?:more|less|fewer|greater|higher|lower|larger|smaller|rather|other) than|\b(?:over|under|above|below|beyond"
    r"|at least|at most|up to|upwards of|almost|nearly|exceed\w*|between|except|after|before|within)"
    r"|\b(?:max(?:imum)?|min(?:imum)?)\b\.?(?: of)?"
    r"|[<>≥≤±/:]|(?<!\w)-) *(?:about |around |roughly |approximately )?$",
    re.IGNORECASE,
)
# What makes another number of the one after it: "half of 10", "√16", "point five", "\ln(5)".
_PART = r"(?:hal(?:f|ves)|thirds?|quarters?|fourths?|fifths?|sixths?|sevenths?|eighths?|ninths?|tenths?|hundredths?)\b"
_CHANGED = re.compile(
    rf"(?:\b(?<!first )(?<!second )(?<!third )(?<!fourth )(?<!last )"
    rf"(?:(?:{_PART}|double|triple|quadruple)(?: of)?|twice|thrice|point)(?: an?)?"
    r"|\b(?:root|square|cube|log(?:arithm)?|reciprocal|inverse|opposite|multiple|factor|fraction|power) of"
    r"|[√∛∜]|\\[A-Za-z]+|\b(?:sqrt|cbrt|root|log|ln|lg|exp|sin|cos|tan|abs|floor|ceil|round))[ ({\[|]*$",
    re.IGNORECASE,
)
# "one third" is not one, "two and a half" not two, and "5 people or more" not five.
_UNIT_WORD = r"(?!(?:is|was|are|were|the|or|and)\b)[A-Za-z°%$€£¥¢]++\.?"
_UNIT_WORDS = rf"(?: ?{_UNIT_WORD}(?: {_UNIT_WORD})?)?"
_OPEN_ENDED = re.compile(
    rf" ?(?:\+|±|‰|:\d)|{_UNIT_WORDS},? \(?(?:or (?:so|more|less|fewer|higher|lower|above|below|thereabouts)\b"
    rf"|and (?:more|above|over|up|counting)\b|and (?:a |one |1 )?{_PART}"
    r"|at (?:the )?(?:most|least|maximum|minimum)\b|max(?:imum)?\b|minimum\b|plus$|tops\b|upwards?\b)"
    rf"| ?(?:a|one|1)?[ -]?{_PART}"
    r"| (?:squared|cubed|doubled|tripled|halved|factorial|to the (?:power|\w+th|second|third)\b|bps\b|basis points?\b)"
    r"| (?:per mill?e?\b|permille\b|ppm\b)",
    re.IGNORECASE,
)
_NEGATED = re.compile(r"\b(?:not|never|neither|nor|cannot)\b|n't\b", re.IGNORECASE)
_MONTH = re.compile(
    r"\b(?:jan(?:uary)?|feb(?:ruary)?|mar(?:ch)?|apr(?:il)?|may|june?|july?|aug(?:ust)?|sept?(?:ember)?|oct(?:ober)?"
    r"|nov(?:ember)?|dec(?:ember)?)\b",
    re.IGNORECASE,
)
_DAYS = range(1, 32)
_TAIL = re.compile(r"(?:\banswer is|=|≈)\s*", re.IGNORECASE)
_MAX_WORDS_AFTER = 2


@dataclass(frozen=True)
class Quantity:
    """A number; ``unit`` is "" if unknown."""

    value: float
    percent: bool = False
    unit: str = ""
    numerator: float | None = field(default=None, compare=False)
    """The numerator, if it is written as a fraction."""
    other: float | None = field(default=None, compare=False)
    """An alternative meaning: 5 for "5 M", five million for "5 m", half a dollar for "50 cents"."""


def stated_quantity(text: str) -> Quantity | None:
    """Parse the only number that a plain text states; None without one."""
    text = digits_for_words(text.strip().rstrip(".!,;").strip())
    if text.lower().lstrip("+-") in ("nan", "inf", "infinity", "none"):
        return Quantity(0.0 if text.lower() == "none" else float(text))
    found = list(_mentions(text))
    if not found and _TAIL.search(text) is None:
        return None
    values = {one for one in found if one is not None}
    if len(values) == 1 and None not in found:
        return values.pop()
    # "60 + 40 = 100" says 100; so does "100", an empty line, and why.
    tail, first = _TAIL.split(text)[-1], text.split("\n\n")[0]
    return stated_quantity(tail) if tail != text else whole_quantity(first) if first != text else None


def whole_quantity(text: str) -> Quantity | None:
    """Parse a text that is a number with at most a unit ("12 cm", not "Top 10"); None for others."""
    found = stated_quantity(text)
    plain = digits_for_words(text.strip())
    match = _NUMBER.match(plain)
    if found is None or (match is None and found.value and math.isfinite(found.value)):
        return None
    rest = plain[match.end("body") :] if match else ""
    return found if len(rest.split()) <= _MAX_WORDS_AFTER else None


def _mentions(text: str) -> Iterator[Quantity | None]:
    """Yield each number, None for digits that are part of other words or negated."""
    end = 0
    for match in _NUMBER.finditer(text):
        if any(char.isdigit() for char in text[end : match.start()]):
            yield None
        before = text[end : match.start()]
        end = match.end()
        yield None if _is_negated(before, text[match.end("body") :], match) else _quantity(match)
    if any(char.isdigit() for char in text[end:]):
        yield None


def _is_negated(before: str, after: str, match: re.Match[str]) -> bool:
    clause = re.split(r"[.;,:!?\n]", before)[-1]
    if (
        _NOT_THIS.search(before[-40:])
        or _CHANGED.search(before[-40:])
        or _NEGATED.search(clause)
        or _OPEN_ENDED.match(after)
    ):
        return True
    day = match["body"].isdigit() and len(match["body"]) <= 2 and int(match["body"]) in _DAYS
    return day and (_MONTH.match(after.strip()) is not None or _MONTH.search(before[-10:]) is not None)


def _quantity(match: re.Match[str]) -> Quantity | None:
    body = re.sub(r"(?<=\d)[ ',](?=\d{2,3}(?:\D|$))", "", match["body"]) if "/" not in match["body"] else match["body"]
    whole, _, fraction = body.rpartition(" ")
    try:
        above, _, below = fraction.partition("/")
        value = float(above) / float(below or 1) + float(whole or 0)
        value *= _power(match["power"] or "", value)
    except (ArithmeticError, ValueError):
        return None
    value *= _SCALES.get((match["scale"] or match["close"] or "").lower(), 1.0)
    if match["sign"].startswith(("-", "m", "n", "M", "N")) != (match["inner"] == "-"):
        value = -value
    word = match["unit"] or match["apart"] or ""
    value, other, unit = _with_unit(value, word, match["money"] or "")
    return Quantity(
        value + 0.0, match["percent"] is not None, unit, float(above) if below and not whole else None, other
    )


def _with_unit(value: float, word: str, money: str) -> tuple[float, float | None, str]:
    """Return a number scaled by the word after it, its alternative meaning, and its unit."""
    scale, unit = _MAYBE_SCALES.get(word.lower()), _UNITS.get(word.lower(), "")
    if scale and money:
        return value * scale, None, money
    if scale and (not unit or word == "M"):
        return value * scale, value, ""
    if unit == _HUNDREDTHS:
        return value, value / 100, unit
    return value, value * scale if scale else None, money or unit


def _power(power: str, base: float) -> float:
    """Return the factor of "e3", " × 10^3" or "^2"."""
    if not power:
        return 1.0
    if power.startswith("^"):
        return float(base ** (int(power[1:]) - 1))
    return float(f"1e{int(power.rpartition('^')[2]) if '^' in power else int(power[1:])}")
