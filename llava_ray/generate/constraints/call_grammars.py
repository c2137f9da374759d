"""Grammars of required calls: an answer that calls one of some functions, with arguments that fit its schema."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from llava_ray.chat.tool_formats import ToolFormat
from llava_ray.generate.constraints.grammars import quote, write_json
from llava_ray.generate.engine import Constraint, ToolChoice

_NO_ARGUMENTS: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}


def call_constraint(
    tools: Sequence[Mapping[str, Any]], choice: ToolChoice, tool_format: ToolFormat, marks: Mapping[str, int]
) -> Constraint:
    """Return the grammar of an answer that calls as ``choice`` requires; ``marks`` are texts that are tokens.

    Raises RecordError for a function whose parameters cannot be held.
    """
    rules: list[str] = []
    names: list[str] = []
    for index, tool in enumerate(tools):
        function = tool["function"]
        if choice.mode == "named" and function["name"] != choice.name:
            continue
        field = f"tools.{index}.function.parameters"
        schema = function.get("parameters") or _NO_ARGUMENTS
        write = _write_pythonic if tool_format.name == "pythonic" else _write_object
        rules += write(f"call_{index}", function["name"], schema, tool_format, field)
        names.append(f"call_{index}")
    first = f"{_mark(tool_format.start, marks)} " if tool_format.start else ""
    end = f" {quote(chr(10))} {_mark(tool_format.end, marks)}" if tool_format.end else ""
    call = f"{first}{quote(chr(10))} call{end}" if end else "call"
    separator = quote(tool_format.separator or "\n")
    more = f" ({separator} one)*" if choice.parallel else ""
    opening = "" if end else first
    wrapped = f"{opening}{_literal(tool_format.opening)} one{more} {_literal(tool_format.closing)}"
    lines = [f"start: {wrapped}", f"one: {call}", f"call: {' | '.join(names)}", *rules]
    field = "tool_choice" if choice.mode == "named" else "tools"
    return Constraint("grammar", "\n".join(lines) + "\n", field)


def _write_object(rule: str, name: str, schema: Mapping[str, Any], tool_format: ToolFormat, field: str) -> list[str]:
    """Return the rules of a call written as a JSON object."""
    head = f'{{"name": {json.dumps(name)}, "{tool_format.arguments}": '
    return [f"{rule}: {quote(head)} {rule}_arguments {quote('}')}", f"{rule}_arguments: {write_json(schema, field)}"]


def _write_pythonic(rule: str, name: str, schema: Mapping[str, Any], tool_format: ToolFormat, field: str) -> list[str]:
    """Return the rules of a call written as Python's: required arguments first, then the others, in their order."""
    del tool_format
    write_json(schema, field)  # checks the whole
    properties = schema.get("properties") or {}
    shared = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    required = [key for key in schema.get("required") or () if key in properties]
    optional = [key for key in properties if key not in required]
    rules = []
    for number, key in enumerate([*required, *optional]):
        value = properties[key]
        inner = {**shared, **value} if isinstance(value, Mapping) else {}
        rules += [
            f"{rule}_{number}: {quote(f'{key}=')} {rule}_{number}_value",
            f"{rule}_{number}_value: {write_json(inner, f'{field}.properties.{key}')}",
        ]
    arguments = [f"{rule}_{number}" for number in range(len(required) + len(optional))]
    comma = quote(", ")
    later = [f"({comma} {argument})?" for argument in arguments]
    if required:
        body = f" {comma} ".join(arguments[: len(required)]) + " " + " ".join(later[len(required) :])
    else:
        starts = [" ".join([argument, *later[index + 1 :]]) for index, argument in enumerate(arguments)]
        body = f"({' | '.join(starts)})?" if starts else ""
    return [f"{rule}: {quote(f'{name}(')} {body} {quote(')')}", *rules]


def _mark(text: str, marks: Mapping[str, int]) -> str:
    return f"<[{marks[text]}]>" if text in marks else quote(text)


def _literal(text: str) -> str:
    return quote(text) if text else ""
