"""Answers inside a JSON object: ``{"answer": "Blue"}`` is Blue."""

import ast
import json
import re
from typing import Any

_NAMES = ("answer", "finalanswer", "correctanswer", "shortanswer")
_WITHOUT_NESTING = re.compile(r"\{[^{}]*\}")
_UNQUOTED = re.compile(r"""\{\s*["']?(?:final_)?answer["']?\s*:([^"'{},]*+),?\s*+\}""", re.IGNORECASE)
# "\frac" within a JSON string is LaTeX, not a form feed before "rac".
_COMMAND = re.compile(r"(?<!\\)\\(?=(?:[dt]?frac|text|times|boxed|begin|bar|beta|neq|nu|rho|theta|tau|right)\b)")
_MAX_NOTATION = 4_000  # characters that are read as Python
_SAID = {True: "yes", False: "no", None: ""}


def without_object(text: str) -> str:
    """Return the answer in a text's only JSON object with one; the text itself if there is none, or several."""
    if "answer" not in text.lower() or "{" not in text:
        return text
    start, end = text.find("{"), text.rfind("}")
    whole = _answer(text[start : end + 1])
    pieces = [whole] if whole is not None else [_answer(piece) for piece in _WITHOUT_NESTING.findall(text)]
    found = {piece for piece in pieces if piece is not None}
    return found.pop() if len(found) == 1 else text


def _answer(text: str) -> str | None:
    """Return the only answer of an object, or None."""
    bare = _UNQUOTED.fullmatch(text)
    if bare and bare[1].strip().lower() not in ("true", "false", "null", "none"):
        return bare[1].strip()
    value = _value(text)
    if not isinstance(value, dict):
        return None
    named = [value_of_name for key, value_of_name in value.items() if re.sub(r"[\W_]", "", str(key).lower()) in _NAMES]
    if not named or any(isinstance(value_of_name, dict | list | tuple | set | bytes) for value_of_name in named):
        return None
    texts = {
        _SAID[value_of_name] if value_of_name is None or isinstance(value_of_name, bool) else str(value_of_name)
        for value_of_name in named
    }
    # Escapes may produce lone surrogates, which no file can hold.
    return texts.pop().encode(errors="ignore").decode() if len(texts) == 1 else None


def _value(text: str) -> Any:
    """Parse JSON or a Python literal, with numbers as text."""
    try:
        return json.loads(_COMMAND.sub(r"\\\\", text), strict=False, parse_int=str, parse_float=str, parse_constant=str)
    except (ValueError, RecursionError):
        pass
    try:
        return ast.literal_eval(text) if len(text) <= _MAX_NOTATION else None
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return None
