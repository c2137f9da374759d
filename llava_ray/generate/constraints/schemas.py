"""Checks of JSON Schemas before they are compiled: keywords that cannot be held, and schemas that no text satisfies."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from llava_ray.errors import RecordError
from llava_ray.reading import short_repr

STRUCTURED_OUTPUT = "structured_output"
MAX_DEPTH = 64
_MAX_SHOWN = 60  # characters of a key in a path
_MAX_PATH = 200

# Keywords whose values are schemas, by the form of the value.
_ONE = {"items", "additionalProperties", "additionalItems"}
_MAPS = {"properties", "patternProperties", "$defs", "definitions"}
_LISTS = {"anyOf", "oneOf", "allOf", "prefixItems", "items"}
# Keywords that are held.
_HELD = {
    *_ONE, *_MAPS, *_LISTS, "type", "const", "enum", "$ref", "required", "minItems", "maxItems", "minLength",
    "maxLength", "pattern", "format", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf",
    "minProperties", "maxProperties",
}  # fmt: skip
# Keywords that describe, and restrict nothing.
_DESCRIBING = {
    "$schema", "$id", "$comment", "title", "description", "default", "example", "examples", "deprecated", "readOnly",
    "writeOnly", "discriminator", "contentEncoding", "contentMediaType", "strict",
}  # fmt: skip
_SCALARS = {"string", "number", "integer", "boolean", "null"}


def check_schema(schema: Any, field: str) -> None:
    """Check that a JSON Schema has only keywords that are held, and that a finite text satisfies it.

    Raises RecordError, which names the place in ``field``.
    """
    if not isinstance(schema, Mapping):
        raise _refuse(field, f"expected a JSON Schema, an object; found {type(schema).__name__}")
    _check_keywords(schema, field, 0)
    if not _Finite(schema).holds():
        raise _refuse(
            field,
            "no text satisfies this schema: what it requires contains itself without an end; make a property optional, "
            "or allow null or an empty list",
        )


def _refuse(field: str, words: str) -> RecordError:
    field = field if len(field) <= _MAX_PATH else f"{field[:_MAX_PATH]}…"
    return RecordError(f"{field}: {words}", reason=STRUCTURED_OUTPUT, field=field)


def _check_keywords(node: Any, place: str, depth: int) -> None:
    if isinstance(node, bool):
        return
    if not isinstance(node, Mapping):
        raise _refuse(place, f"expected a schema, an object; found {short_repr(node)}")
    if depth > MAX_DEPTH:
        raise _refuse(place, f"the schema is nested more than {MAX_DEPTH} levels deep; move parts into $defs")
    for name in node:
        if name not in _HELD and name not in _DESCRIBING and not name.startswith("x-"):
            raise _refuse(
                f"{place}.{name[:_MAX_SHOWN]}",
                "this keyword cannot be held in an answer; leave it out, or check it there",
            )
    if "x-guidance" in node:
        raise _refuse(f"{place}.x-guidance", "options of the library are not the request's; leave it out")
    for path, inner in _inner(node):
        _check_keywords(inner, f"{place}.{path}", depth + 1)


def _inner(node: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the schemas directly inside a schema, each with its path."""
    for name, value in node.items():
        if name in _MAPS and isinstance(value, Mapping):
            yield from ((f"{name}.{key[:_MAX_SHOWN]}", inner) for key, inner in value.items())
        elif name in _LISTS and isinstance(value, Sequence) and not isinstance(value, str):
            yield from ((f"{name}.{index}", inner) for index, inner in enumerate(value))
        elif name in _ONE:
            yield name, value


class _Finite:
    """The references that some finite value satisfies, as far as references decide it: the least fixed point."""

    def __init__(self, root: Mapping[str, Any]) -> None:
        self.root = root
        self.finite: set[str] = set()
        """References that some finite value satisfies."""

    def holds(self) -> bool:
        references = set(_references(self.root))
        while True:
            if self.ends(self.root):
                return True
            new = {one for one in references - self.finite if self.ends(_resolve(self.root, one))}
            if not new:
                return False
            self.finite |= new

    def ends(self, node: Any) -> bool:
        if not isinstance(node, Mapping):
            return node is not False
        reference = node.get("$ref")
        if isinstance(reference, str) and reference not in self.finite:
            return False
        if "const" in node or "enum" in node:
            return True
        options = [found for name in ("anyOf", "oneOf") if (found := _listed(node, name))]
        if not all(map(self.ends, _listed(node, "allOf"))) or not all(any(map(self.ends, one)) for one in options):
            return False
        kinds = node.get("type")
        return kinds is None or any(
            self.kind_ends(node, kind) for kind in ([kinds] if isinstance(kinds, str) else kinds)
        )

    def kind_ends(self, node: Mapping[str, Any], kind: Any) -> bool:
        if kind == "object":
            properties = node.get("properties")
            known = properties if isinstance(properties, Mapping) else {}
            return all(self.ends(known.get(name, True)) for name in _listed(node, "required") if isinstance(name, str))
        if kind == "array":
            least = node.get("minItems", 0)
            first = _listed(node, "prefixItems")
            if not isinstance(least, int) or not all(map(self.ends, first[:least])):
                return not isinstance(least, int)
            return least <= len(first) or self.ends(node.get("items", True))
        return True  # a scalar, or no kind at all, which the compiler refuses


def _listed(node: Mapping[str, Any], name: str) -> list[Any]:
    value = node.get(name)
    return value if isinstance(value, list) else []


def _references(node: Any) -> Iterator[str]:
    if isinstance(node, Mapping):
        if isinstance(node.get("$ref"), str):
            yield node["$ref"]
        for _, inner in _inner(node):
            yield from _references(inner)


def _resolve(root: Mapping[str, Any], reference: str) -> Any:
    """Return what a reference within the schema refers to; True for any other, which the compiler refuses."""
    if not reference.startswith("#"):
        return True
    node: Any = root
    for part in reference[1:].split("/")[1:]:
        key = part.replace("~1", "/").replace("~0", "~")
        if isinstance(node, Mapping) and key in node:
            node = node[key]
        elif isinstance(node, list) and key.isdigit() and int(key) < len(node):
            node = node[int(key)]
        else:
            return True
    return node
