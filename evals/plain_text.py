"""An answer as plain text, once for every robust rule: one form of each character, no marks, no markup.

Nothing that could carry the meaning goes: a minus stays a minus, whatever sign it was written with, 10² does not
become 102, and 1½ does not become 11/2, as they would under Unicode's NFKC alone.
"""

import html
import re
import unicodedata

from evals.json_answers import without_object
from evals.markup import without_markup, without_thought

# What NFKC would turn into letters or digits that nobody wrote: "№" into "No", "Nokia™" into "NokiaTM".
BEFORE = str.maketrans({"™": "", "℠": "", "®": "", "©": "", "º": "°", "˚": "°", "№": "#", "ª": ""})
SIGNS = str.maketrans(
    dict.fromkeys("‐‑‒–−﹣⁃", "-")
    | dict.fromkeys("—―⸺", " - ")
    | dict.fromkeys("“”„‟«»‹›「」『』″〝〞", '"')
    | dict.fromkeys("‘’‚‛′´", "'")
    | dict.fromkeys("【〔〖", "[")
    | dict.fromkeys("】〕〗", "]")
    | {"⁄": "/", "∕": "/", "٪": "%", "✕": "×", "∼": "~"}
)
RAISED = re.compile("[⁺⁻]?[⁰¹²³⁴⁵⁶⁷⁸⁹]+")
HALF = re.compile(r"(?<=\d)(?=[¼-¾⅐-⅞])")
UNSEEN = ("Cc", "Cf", "Co", "Cs")
VARIATION = re.compile("[\ufe00-\ufe0f\u200b-\u200f\u2060\u034f]")
BREAKS = re.compile("\r\n?|[\u2028\u2029\x0b\x0c\x85]")
QUOTED = re.compile(r"""\s*(["'])([^"]*?)\1\s*([.,;:!?]?)\s*""", re.DOTALL)
LABEL = re.compile(
    r"\s*(?:(?:so|thus|and|the|my|final|correct|right|best|short)[, ]+){0,4}"
    r"(?:answer|ans|答案|回答)\s*(?:is|是|为)?\s*[:=]\s*",
    re.IGNORECASE,
)
LEAD_IN = re.compile(
    r"\s*(?:(?:so|thus|hence|therefore),?\s+)?(?:the|my)\s+(?:(?:final|correct|right|best)\s+)?answer"
    r"\s+(?:is|would be|should be)\b\s*[:=]?\s*",
    re.IGNORECASE,
)


def plain(text: str) -> str:
    """Return an answer as plain text; what a model thought before it, quotation marks around it, markup are gone."""
    text = without_object(without_thought(text))  # before an escaped or curly quotation mark becomes one that ends it
    text = html.unescape(text) if "&" in text else text
    if not text.isascii():
        text = _one_form(text)
    text = BREAKS.sub("\n", text)
    text = "".join(char for char in text if char in "\n\t" or unicodedata.category(char) not in UNSEEN)
    text = without_markup(text)
    return _unquoted(re.sub(r"[^\S\n]+", " ", text).strip())


def without_label(text: str) -> str:
    """Return a plain text without "Answer:" in front."""
    return _unquoted(LABEL.sub("", text, count=1).strip()) if LABEL.match(text) else text


def without_lead_in(text: str) -> str:
    """Return a plain text without "Answer:" or "The answer is" in front."""
    text = without_label(text)
    return _unquoted(LEAD_IN.sub("", text, count=1).strip()) if LEAD_IN.match(text) else text


def _one_form(text: str) -> str:
    text = VARIATION.sub("", text).translate(BEFORE)
    text = RAISED.sub(lambda match: "^" + unicodedata.normalize("NFKC", match[0]), text)
    text = unicodedata.normalize("NFKC", HALF.sub(" ", text)).translate(SIGNS)
    return "".join(str(unicodedata.digit(char)) if char.isdecimal() else char for char in text)


def _unquoted(text: str) -> str:
    whole = QUOTED.fullmatch(text)
    return (whole[2].strip() + whole[3]) if whole and whole[1] not in whole[2] else text
