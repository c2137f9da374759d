"""Values of a config.json that have several spellings."""

from typing import Any

from llava_ray.config.literals import read_literal
from llava_ray.reading import short_repr, wrap_errors


def to_tuples(value: Any, where: str) -> Any:
    """Convert lists to tuples, also those stored as text ("[(336, 672)]", "336,672"). Raises ModelError."""
    if isinstance(value, str):
        with wrap_errors(f"{where}: {short_repr(value)}", "Fix it.", says="is not a list of numbers"):
            value = read_literal(value)
    return tuple(to_tuples(item, where) for item in value) if isinstance(value, list | tuple) else value
