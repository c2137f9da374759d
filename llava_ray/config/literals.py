"""Numbers and lists that a config holds as text."""

import ast
from typing import Any

_MAX_CHARS = 10_000


def read_literal(text: str) -> Any:
    """Return the value that a text such as "[(336, 672)]" or "336,672" writes. Raises ValueError."""
    if len(text) > _MAX_CHARS:
        raise ValueError(f"{len(text):,} characters are no list of numbers")
    try:
        return ast.literal_eval(text)
    except SyntaxError as error:
        raise ValueError(f"cannot be read ({error.msg}); expected numbers") from error
    except (MemoryError, RecursionError, TypeError) as error:  # what Python's parser raises at nested brackets
        raise ValueError("cannot be read; expected numbers") from error
