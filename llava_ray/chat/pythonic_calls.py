"""Reading of calls written as a Python list: ``[f(x=1), g(y="z")]``."""

from __future__ import annotations

import ast
import json
from collections.abc import Collection
from typing import Any

_MAX_CHARS = 200_000
_JSON_NAMES = {"true": True, "false": False, "null": None}


def read_pythonic(text: str, names: Collection[str]) -> list[tuple[str, str]] | None:
    """Return the name and the arguments, as JSON, of each call; None for a text that is no list of known calls."""
    if len(text) > _MAX_CHARS:
        return None
    try:
        tree = ast.parse(text, mode="eval").body
        if not isinstance(tree, ast.List) or not tree.elts:
            return None
        return [_read_call(call, text, names) for call in tree.elts]
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _read_call(call: ast.expr, text: str, names: Collection[str]) -> tuple[str, str]:
    if not isinstance(call, ast.Call) or call.args:
        raise ValueError("not a call with named arguments")
    name = ast.unparse(call.func)
    if name not in names:
        raise ValueError("an unknown function")
    arguments: dict[str, Any] = {}
    for keyword in call.keywords:
        if keyword.arg is None:
            raise ValueError("arguments without a name")
        arguments[keyword.arg] = _read_value(keyword.value, text)
    return name, json.dumps(arguments, ensure_ascii=False)


def _read_value(node: ast.expr, text: str) -> Any:
    source = ast.get_source_segment(text, node)
    try:
        return json.loads(source or "")  # JSON's escapes differ from Python's
    except ValueError:
        return _convert(node)


def _convert(node: ast.expr) -> Any:
    if isinstance(node, ast.Name) and node.id in _JSON_NAMES:
        return _JSON_NAMES[node.id]
    if isinstance(node, ast.List | ast.Tuple):
        return [_convert(item) for item in node.elts]
    if isinstance(node, ast.Dict):
        return {str(_convert(key)): _convert(value) for key, value in zip(node.keys, node.values, strict=True) if key}
    value = ast.literal_eval(node)
    json.dumps(value, allow_nan=False)
    return value
