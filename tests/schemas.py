"""Random JSON Schemas of the keywords that answers can be held to: nested, with enums, patterns and recursion."""

import random
from typing import Any

PATTERNS = ["^[a-f]{2,4}$", r"^\d{3}-\d{2}$", "^(red|blue)+$", "x[0-9]", "^[A-Z][a-z]*$"]
FORMATS = ["date", "uuid", "ipv4", "email", "time"]
WORDS = ["a", "b b", "é", '"', "\\", "0", "", "<", "Größe"]


def make_schema(seed: int) -> dict[str, Any]:
    """Make one schema; a third of them refer to a recursive definition."""
    draw = random.Random(seed)
    schema = _make(draw, draw.randint(1, 3), "")
    if draw.random() < 0.33:
        node = {
            "type": "object",
            "properties": {
                "value": _make(draw, 0, ""),
                "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]},
                "children": {"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 2},
            },
            "required": draw.choice([["value"], ["value", "next"]]),
            "additionalProperties": False,
        }
        schema = {
            "type": "object",
            "properties": {"tree": {"$ref": "#/$defs/node"}, "rest": schema},
            "required": ["tree"],
            "additionalProperties": False,
            "$defs": {"node": node},
        }
    return schema


def _make(draw: random.Random, depth: int, place: str) -> dict[str, Any]:
    kinds = [_string, _integer, _number, _boolean, _null, _enum, _const]
    if depth:
        kinds = [*kinds[:3], _object, _object, _array, _tuple, _any_of, _any_of, _all_of, _one_of]
    return draw.choice(kinds)(draw, depth - 1)


def _string(draw: random.Random, depth: int) -> dict[str, Any]:
    del depth
    kind = draw.random()
    if kind < 0.35:
        return {"type": "string", "pattern": draw.choice(PATTERNS), **({"maxLength": 12} if kind < 0.2 else {})}
    if kind < 0.5:
        return {"type": "string", "format": draw.choice(FORMATS)}
    least = draw.randint(0, 3)
    return {"type": "string", "minLength": least, "maxLength": least + draw.randint(0, 9)}


def _integer(draw: random.Random, depth: int) -> dict[str, Any]:
    del depth
    low = draw.randint(-1000, 1000)
    return draw.choice(
        [
            {"type": "integer", "minimum": low, "maximum": low + draw.randint(0, 500)},
            {"type": "integer", "exclusiveMinimum": low, "exclusiveMaximum": low + draw.randint(2, 60)},
            {"type": "integer", "multipleOf": draw.randint(2, 9), "minimum": 0, "maximum": 90},
        ]
    )


def _number(draw: random.Random, depth: int) -> dict[str, Any]:
    del depth
    low = round(draw.uniform(-50, 50), 1)
    return {"type": "number", "minimum": low, "maximum": round(low + draw.uniform(1, 50), 1)}


def _boolean(draw: random.Random, depth: int) -> dict[str, Any]:
    del draw, depth
    return {"type": "boolean"}


def _null(draw: random.Random, depth: int) -> dict[str, Any]:
    del draw, depth
    return {"type": "null"}


def _enum(draw: random.Random, depth: int) -> dict[str, Any]:
    del depth
    return {"enum": draw.sample([*WORDS, 1, 2.5, None, True, ["x"], {"k": 1}], draw.randint(1, 5))}


def _const(draw: random.Random, depth: int) -> dict[str, Any]:
    del depth
    return {"const": draw.choice([*WORDS, 7, None, {"a": [1, "b"]}])}


def _object(draw: random.Random, depth: int) -> dict[str, Any]:
    names = draw.sample(["id", "name", "größe", "a b", 'q"q', "x-y", "tags"], draw.randint(1, 4))
    properties = {name: _make(draw, max(0, depth), name) for name in names}
    required = draw.sample(names, draw.randint(0, len(names)))
    more: dict[str, Any] = {"additionalProperties": False}
    if draw.random() < 0.15:
        more = {"additionalProperties": {"type": "integer", "minimum": 0, "maximum": 9}, "maxProperties": 6}
        more = {"additionalProperties": more["additionalProperties"]}
    return {"type": "object", "properties": properties, "required": required, **more}


def _array(draw: random.Random, depth: int) -> dict[str, Any]:
    least = draw.randint(0, 2)
    return {
        "type": "array",
        "items": _make(draw, max(0, depth), ""),
        "minItems": least,
        "maxItems": least + draw.randint(0, 2),
    }


def _tuple(draw: random.Random, depth: int) -> dict[str, Any]:
    first = [_make(draw, max(0, depth), "") for _ in range(draw.randint(1, 2))]
    return {"type": "array", "prefixItems": first, "items": False, "minItems": len(first)}


def _any_of(draw: random.Random, depth: int) -> dict[str, Any]:
    return {"anyOf": [_make(draw, max(0, depth), "") for _ in range(draw.randint(1, 3))]}


def _one_of(draw: random.Random, depth: int) -> dict[str, Any]:
    """Objects that a constant tells apart, as pydantic writes unions."""
    options = []
    for kind in ("cat", "dog"):
        inner = _make(draw, max(0, depth), "")
        properties = {"kind": {"const": kind}, "it": inner}
        options.append(
            {"type": "object", "properties": properties, "required": ["kind"], "additionalProperties": False}
        )
    return {"oneOf": options}


def _all_of(draw: random.Random, depth: int) -> dict[str, Any]:
    del depth
    low = draw.randint(0, 50)
    return draw.choice(
        [
            {"allOf": [{"type": "integer", "minimum": low}, {"maximum": low + 20}]},
            {"allOf": [{"type": "string", "minLength": 2}, {"maxLength": 5}, {"pattern": "^[a-z]*$"}]},
        ]
    )
