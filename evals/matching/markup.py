"""Removal of Markdown, HTML and LaTeX from an answer, keeping its content."""

import re

from evals.json_answers import without_object

_BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{((?:[^{}]|\{[^{}]*\})*)\}")
_SET_AS = re.compile(r"\\(?:text|text(?:bf|it|rm)|math(?:rm|bf|it|sf)|operatorname|emph|underline)\s*\{([^{}]*)\}")
_FRACTION = re.compile(r"(\d)?\\[dt]?frac\s*(?:\{([^{}]*)\}\s*\{([^{}]*)\}|(\d)(\d))")
_MATH = re.compile(r"(\$\$?)(?=[^\s$])([^$]*[^\s$])\1(?!\d)")
_RAISED = re.compile(r"\^\{([^{}]*)\}")
_COMMANDS = tuple(
    (re.compile(pattern), plain)
    for pattern, plain in (
        # A command ends where its letters end: "\times10" is "\times" and 10.
        (r"\^\{?\\circ\}?|\\degree(?![A-Za-z])", "°"),
        (r"\{,\}", ","),
        (r"\\(?:times|cdot)(?![A-Za-z])", "×"),
        (r"\\(?:approx|sim)(?![A-Za-z])", "≈"),
        (r"\\pm(?![A-Za-z])", "±"),
        (r"\\(?:geq?|geqslant)(?![A-Za-z])", "≥"),
        (r"\\(?:leq?|leqslant)(?![A-Za-z])", "≤"),
        (r"\\(?:left|right|displaystyle|textstyle|bf|rm|it|large|Large|huge)(?![A-Za-z])|\\!", ""),
        (r"\\[,;: ]|\\q?quad(?![A-Za-z])|\\[()\[\]]", " "),
        (r"\\([%$#&_{}])", r"\1"),
    )
)
_TAG = re.compile(r"</?(?:b|strong|i|em|u|p|span|code|mark|q|div|center|font)(?:\s[^<>]{0,200})?>", re.IGNORECASE)
_CONTROL = re.compile(r"</?s>|<\|[a-z_]+\|>|<(?:eos|pad|bos)>")
_BREAK = re.compile(r"<br\s*/?>", re.IGNORECASE)
_TOLD = re.compile(r"<answer>(.*?)</answer>", re.IGNORECASE | re.DOTALL)
_FENCE = re.compile(r"^[ \t]*(?:```|~~~)[\w-]*[ \t]*$", re.MULTILINE)
_POWER = re.compile(r"(?<=\d) ?\*\* ?(?=-?\d)")  # of Python: 10**5
_EMPHASIS = tuple(
    re.compile(pattern)
    for pattern in (
        r"\*\*\*([^*\n]+)\*\*\*",
        r"\*\*([^*\n]+)\*\*",
        r"(?<![\w*])\*(?=\S)([^*\n]*[^*\s])\*(?![\w*])",
        r"(?<!\w)_{1,3}(?=[^\s_])([^_\n]*[^_\s])_{1,3}(?!\w)",
        r"~~([^~\n]+)~~",
    )
)
_STRAY = re.compile(r"\*\*+|(?<![A-Za-z0-9])__+|__+(?![A-Za-z0-9])")
# A heading, a quotation, a bullet; not "- 5" and "> 5", which may mean less than nothing and more than five.
_LINE_MARK = re.compile(r"^[ \t]*(?:#{1,6}[ \t]+|[*•][ \t]+|[>-][ \t]+(?=[^\W\d]|[\"'(\[*_]))", re.MULTILINE)


def without_thought(text: str) -> str:
    """Return the text after a model's reasoning; nothing if the reasoning did not end."""
    lowered = text.lower()
    if "</think>" in lowered:
        return text[lowered.rindex("</think>") + len("</think>") :]
    return text[: lowered.index("<think>")] if "<think>" in lowered else text


def without_markup(text: str) -> str:
    """Remove a text's markup; return the only boxed or tagged answer if there is one."""
    text = _only_of(_TOLD, text) if "</answer>" in text.lower() else text
    text = without_object(_FENCE.sub("", text))
    if "\\" in text or "$" in text or "{" in text:
        text = _without_latex(text)
    if "<" in text:
        text = _BREAK.sub("\n", _CONTROL.sub("", text))
        text = _TAG.sub("", text) if "</" in text else text
    text = _POWER.sub("^", text.replace("`", ""))
    text = _LINE_MARK.sub("", text)
    for pattern in _EMPHASIS:
        text = pattern.sub(r"\1", text)
    return _STRAY.sub("", text)


def _without_latex(text: str) -> str:
    text = _SET_AS.sub(r"\1", text)
    text = _only_of(_BOXED, text)
    text = _FRACTION.sub(_slash, _SET_AS.sub(r"\1", text))
    for pattern, plain in _COMMANDS:
        text = pattern.sub(plain, text)
    return _MATH.sub(r"\2", _RAISED.sub(r"^\1", text))


def _slash(match: re.Match[str]) -> str:
    above, below = (match[2], match[3]) if match[2] is not None else (match[4], match[5])
    return f"{match[1]} {above}/{below}" if match[1] else f"{above}/{below}"


def _only_of(pattern: re.Pattern[str], text: str) -> str:
    """Return a pattern's only match, or the text with all matches unwrapped."""
    found = {match.strip() for match in pattern.findall(text)}
    return found.pop() if len(found) == 1 else pattern.sub(r" \1 ", text)
