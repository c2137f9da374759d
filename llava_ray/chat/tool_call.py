"""Calls of tools in the answers of records, in all usual forms."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from llava_ray.errors import RecordError
from llava_ray.reading import short_repr


@dataclass(frozen=True)
class ToolCall:
    """A call of a function in an answer."""

    name: str
    arguments: str
    """A JSON object."""
    id: str = ""


def read_calls(value: object, place: str) -> tuple[ToolCall, ...]:
    """Read the calls of an answer: OpenAI's list, one call or a list of calls, or JSON text of them.

    Raises RecordError ("unsupported"), which names ``place``.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise _bad_call(place, f"{short_repr(value)} is not JSON") from error
    if value is None:
        return ()
    return tuple(
        _read_call(call, f"{place} {number}")
        for number, call in enumerate(value if isinstance(value, list) else [value], start=1)
    )


def _read_call(call: object, place: str) -> ToolCall:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(name, str) or not name:
        raise _bad_call(place, "it has no function with a name")
    arguments = function.get("arguments", function.get("parameters"))
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError) as error:
            raise _bad_call(place, f"the arguments of {short_repr(name)} are not JSON") from error
    if not isinstance(arguments, Mapping):
        raise _bad_call(place, f"the arguments of {short_repr(name)} are {type(arguments).__name__}, not an object")
    known = call.get("id") if isinstance(call, Mapping) else None
    return ToolCall(name, json.dumps(arguments, ensure_ascii=False), str(known or ""))


def _bad_call(place: str, words: str) -> RecordError:
    return RecordError(
        f'{place}: {words}; expected calls such as {{"function": {{"name": ..., "arguments": {{...}}}}}}. '
        "Fix or remove the record.",
        reason="unsupported",
    )
