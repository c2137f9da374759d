"""The tools of a record, attached to its turns."""

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llava_ray.chat.conversation import Turn, break_markers, split_system
from llava_ray.data.json_text import parse_json
from llava_ray.data.record_keys import is_absent
from llava_ray.errors import RecordError
from llava_ray.reading import short_repr


def attach_tools(turns: tuple[Turn, ...], listed: Any) -> tuple[Turn, ...]:
    """Attach a record's ``tools`` to its first question. Raises RecordError."""
    if is_absent(listed):
        return turns
    if isinstance(listed, str):  # Parquet tables often store them as JSON text
        try:
            listed = parse_json(listed)
        except RecordError as error:
            raise _bad_tools(f"they are text that is not JSON ({error})") from error
    if not isinstance(listed, list):
        raise _bad_tools(f"they are {type(listed).__name__}, not a list")
    tools = [_read_tool(tool, number) for number, tool in enumerate(listed, start=1)]
    names = [tool["function"]["name"] for tool in tools]
    if len(set(names)) < len(names):
        raise _bad_tools("two of them have the same name")
    if not tools:
        return turns
    system, spoken = split_system(turns)
    first = replace(spoken[0], tools=break_markers(json.dumps(tools, ensure_ascii=False)))
    return (*([] if system is None else [turns[0]]), first, *spoken[1:])


def _read_tool(tool: Any, number: int) -> dict[str, Any]:
    """Return a tool in OpenAI's form; a bare function is wrapped."""
    function = tool.get("function", tool) if isinstance(tool, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(name, str) or not name:
        raise _bad_tools(f"tool {number} has no function with a name")
    if not isinstance(function.get("parameters", {}), Mapping):
        raise _bad_tools(f"the parameters of {short_repr(name)} are no JSON Schema, an object")
    return {"type": "function", "function": dict(function)}


def _bad_tools(words: str) -> RecordError:
    return RecordError(
        f"`tools` is not supported, and would be lost: {words}. Fix or remove the record", reason="unsupported"
    )
