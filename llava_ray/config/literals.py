"""Numbers and lists stored as text in a config."""

import ast
from typing import Any

_MAX_CHARS = 10_000


def read_literal(text: str) -> Any:
    """Parse a text such as "[(336, 672)]" or "336,672". Raises ValueError."""
    if len(text) > _MAX_CHARS:
        raise ValueError(f"{len(text):,} characters are not a list of numbers")
    try:
        return ast.literal_eval(text)
    except SyntaxError as error:
        raise ValueError(f"cannot be read ({error.msg}); expected numbers") from error
    except (MemoryError, RecursionError, TypeError) as error:  # raised by Python's parser for nested brackets
        raise ValueError("cannot be read; expected numbers") from error
