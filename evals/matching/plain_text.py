"""Normalisation of answers to plain text for all robust rules: one form of each character, no markup.

Nothing meaningful is removed: a minus stays a minus, whichever sign it is, 10² does not become 102, and 1½ does not
become 11/2, as they would under Unicode's NFKC alone.
"""

import html
import re
import unicodedata

from evals.json_answers import without_object
from evals.matching.markup import without_markup, without_thought

# Characters that NFKC would turn into other letters or digits: "№" into "No", "Nokia™" into "NokiaTM".
_BEFORE = str.maketrans({"™": "", "℠": "", "®": "", "©": "", "º": "°", "˚": "°", "№": "#", "ª": ""})
_SIGNS = str.maketrans(
    dict.fromkeys("‐‑‒–−﹣⁃", "-")
    | dict.fromkeys("—―⸺", " - ")
    | dict.fromkeys("“”„‟«»‹›「」『』″〝〞", '"')
    | dict.fromkeys("‘’‚‛′´", "'")
    | dict.fromkeys("【〔〖", "[")
    | dict.fromkeys("】〕〗", "]")
    | {"⁄": "/", "∕": "/", "٪": "%", "✕": "×", "∼": "~"}
)
_RAISED = re.compile("[⁺⁻]?[⁰¹²³⁴⁵⁶⁷⁸⁹]+")
_HALF = re.compile(r"(?<=\d)(?=[¼-¾⅐-⅞])")
_UNSEEN = ("Cc", "Cf", "Co", "Cs")
_VARIATION = re.compile("[\ufe00-\ufe0f\u200b-\u200f\u2060\u034f]")
_BREAKS = re.compile("\r\n?|[\u2028\u2029\x0b\x0c\x85]")
_QUOTED = re.compile(r"""\s*(["'])([^"]*?)\1\s*([.,;:!?]?)\s*""", re.DOTALL)
_LABEL = re.compile(
    r"\s*(?:(?:so|thus|and|the|my|final|correct|right|best|short)[, ]+){0,4}"
    r"(?:answer|ans|答案|回答)\s*(?:is|是|为)?\s*[:=]\s*",
    re.IGNORECASE,
)
_LEAD_IN = re.compile(
    r"\s*(?:(?:so|thus|hence|therefore),?\s+)?(?:the|my)\s+(?:(?:final|correct|right|best)\s+)?answer"
    r"\s+(?:is|would be|should be)\b\s*[:=]?\s*",
    re.IGNORECASE,
)


def to_plain_text(text: str) -> str:
    """Convert an answer to plain text, without reasoning, surrounding quotation marks and markup."""
    text = without_object(without_thought(text))  # before an escaped or curly quotation mark becomes one that ends it
    text = html.unescape(text) if "&" in text else text
    if not text.isascii():
        text = _one_form(text)
    text = _BREAKS.sub("\n", text)
    text = "".join(char for char in text if char in "\n\t" or unicodedata.category(char) not in _UNSEEN)
    text = without_markup(text)
    return _unquoted(re.sub(r"[^\S\n]+", " ", text).strip())


def without_label(text: str) -> str:
    """Remove a leading "Answer:" from a plain text."""
    return _unquoted(_LABEL.sub("", text, count=1).strip()) if _LABEL.match(text) else text


def without_lead_in(text: str) -> str:
    """Remove a leading "Answer:" or "The answer is" from a plain text."""
    text = without_label(text)
    return _unquoted(_LEAD_IN.sub("", text, count=1).strip()) if _LEAD_IN.match(text) else text


def _one_form(text: str) -> str:
    text = _VARIATION.sub("", text).translate(_BEFORE)
    text = _RAISED.sub(lambda match: "^" + unicodedata.normalize("NFKC", match[0]), text)
    text = unicodedata.normalize("NFKC", _HALF.sub(" ", text)).translate(_SIGNS)
    return "".join(str(unicodedata.digit(char)) if char.isdecimal() else char for char in text)


def _unquoted(text: str) -> str:
    whole = _QUOTED.fullmatch(text)
    return (whole[2].strip() + whole[3]) if whole and whole[1] not in whole[2] else text
