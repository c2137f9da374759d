"""Constraints with damage in them, made from numbers: schemas, patterns and grammars, nearly right or hostile."""

import copy
import json
import random
from collections.abc import Callable
from typing import Any

from schemas import make_schema

from llava_ray.generate.engine import Constraint

KEYWORDS = [
    "type", "const", "enum", "anyOf", "oneOf", "allOf", "$ref", "$defs", "properties", "required", "items", "not", "if",
    "additionalProperties", "patternProperties", "prefixItems", "minItems", "maxItems", "minLength", "maxLength",
    "pattern", "format", "minimum", "maximum", "exclusiveMinimum", "multipleOf", "minProperties", "maxProperties",
    "uniqueItems", "title", "default", "$schema", "x-guidance", "$id", "nullable",
]  # fmt: skip
ODD: list[Any] = [
    None, True, False, 0, -1, 1, 2**63, 10**30, 1e308, 0.1, "", "a", "#", "#/$defs/node", "#/properties/id", "\x00",
    "\U0001f600", [], ["string"], ["string", "null"], [{}], {}, {"type": "string"}, {"a": {}}, {"$ref": "#"},
    "^a$", "(a|b)*c", "[", "date", 10_000, {"type": "object", "required": ["a"]}, {"not": {}}, [[]],
]  # fmt: skip
PATTERNS = [
    "[a-z]{2,9}", r"\d+(\.\d+)?", "(yes|no)( please)?", "a{3,}", "(a|b)*a(a|b){5}", r"[^\"\\]*", r"\p{Lu}\w+", "x?y?z?",
    "/a/",
]  # fmt: skip
GRAMMARS = [
    'start: "a" item* "z"\nitem: /[0-9]+/ | "(" item ")"\n', 'root ::= "yes" | "no" rest\nrest ::= [a-z]+ | ""\n',
    "start: NUMBER\n%import common.NUMBER\n", 'start: %json {"type": "integer"}\n', 'start: x{2,4}\nx: "x" | "y"\n',
]  # fmt: skip
PIECES = [
    *"()[]{}|*+?^$./:", "{1000}", "{0,9}", "\\", "\\p{", '"', "start", "::=", "\n", "é", "<[2]>", "%json {",
    "%lark", "&", "~",
]  # fmt: skip


def make_constraint(seed: int) -> Constraint:
    """Make one constraint of any kind; about half of them can be held."""
    draw = random.Random(seed)
    make = draw.choice([_schema, _schema, _schema, _pattern, _grammar, _choices])
    return make(draw)


def _schema(draw: random.Random) -> Constraint:
    schema = make_schema(draw.randrange(10**6))
    for _ in range(draw.choice([0, 0, 1, 1, 2, 4])):
        _mutate(draw, schema)
    text = json.dumps(schema)
    if draw.random() < 0.03:
        text = text[: draw.randrange(len(text))]
    return Constraint("json", text, "schema")


def _mutate(draw: random.Random, schema: dict[str, Any]) -> None:
    """Change one schema inside a schema."""
    places: list[dict[str, Any]] = []

    def collect(node: Any) -> None:
        if isinstance(node, dict):
            places.append(node)
            for value in node.values():
                collect(value)
        elif isinstance(node, list):
            for value in node:
                collect(value)

    collect(schema)
    place = draw.choice(places)
    action = draw.random()
    if action < 0.2 and place:
        del place[draw.choice(list(place))]
    elif action < 0.35:
        count = draw.choice([2, 20, 200])
        place[draw.choice(["anyOf", "allOf", "enum", "prefixItems"])] = [_odd(draw) for _ in range(count)]
    elif action < 0.5:
        place["properties"] = {f"p{index}": _odd(draw, 14) for index in range(draw.choice([1, 30, 300]))}
    else:
        place[draw.choice(KEYWORDS)] = _odd(draw)


def _odd(draw: random.Random, last: int = len(ODD)) -> Any:
    return copy.deepcopy(draw.choice(ODD[-last:]))


def _splice(draw: random.Random, texts: list[str]) -> str:
    text = draw.choice(texts)
    for _ in range(draw.choice([0, 0, 1, 2, 5])):
        start = draw.randint(0, len(text))
        stop = min(len(text), start + draw.choice([0, 0, 1, 4]))
        piece: Callable[[], str] = lambda: draw.choice([*PIECES, *texts])  # noqa: E731
        text = text[:start] + piece() * draw.choice([1, 1, 2, 300]) + text[stop:]
    return text


def _pattern(draw: random.Random) -> Constraint:
    return Constraint("regex", _splice(draw, PATTERNS), "pattern")


def _grammar(draw: random.Random) -> Constraint:
    return Constraint("grammar", _splice(draw, GRAMMARS), "grammar")


def _choices(draw: random.Random) -> Constraint:
    choices = ["".join(draw.choices([*'ab é"\\\n', *PIECES], k=draw.randint(1, 9))) for _ in range(draw.randint(1, 50))]
    return Constraint("choice", json.dumps(choices), "choices")
