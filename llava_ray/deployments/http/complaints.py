"""Error messages for invalid requests, which name the field and never repeat its value."""

import json
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError

from llava_ray.deployments.http.neutral_fields import TOOL_FIELDS, Neutral
from llava_ray.deployments.refusal import RefusalError, refuse

_SHOWN_CHARS = 60  # of a name in an error message
_TAG_MARK = "\0"  # prefix of the tags of a union's members, which pydantic adds to its paths
_WRONG_FIELD = "wrong_field"


def wrong_field(field: str, words: str) -> PydanticCustomError:
    """Return a validator's error about a field of the object, or, without a name, about the object itself."""
    return PydanticCustomError(_WRONG_FIELD, "{words}", {"field": field, "words": words})


def excerpt(value: object) -> str:
    """Return a quoted excerpt of a string, or the JSON type of any other value."""
    return repr(value[:_SHOWN_CHARS]) if isinstance(value, str) else _JSON_NAMES.get(type(value), "an unknown value")


_JSON_NAMES: dict[type, str] = {
    bool: "true or false",
    int: "a number",
    float: "a number",
    list: "a list",
    dict: "an object",
    type(None): "null",
}

# Replacements for pydantic's messages that use Python's terms, by error type.
_WORDS = {
    "too_long": "at most {max_length} entries",
    "too_short": "at least {min_length} entries",
    "string_too_long": "at most {max_length} characters",
    "string_too_short": "at least {min_length} characters",
    "tuple_type": "expected a list",
    "string_type": "expected a text",
    "missing": "missing",
}


def describe_invalid_request(error: ValidationError, neutral: Neutral | None = None) -> RefusalError:
    """Convert pydantic's first error to OpenAI's form; ``neutral`` are the accepted values of ignored fields."""
    detail = error.errors(include_url=False, include_input=False)[0]
    path = _path_of(detail)
    message = _message_of(detail)
    if detail["type"] == "json_invalid":
        return refuse(400, f"the body is not JSON: {message}", "invalid_json")
    if detail["type"] == "extra_forbidden":
        name = str(detail["loc"][-1])[:_SHOWN_CHARS]
        if name in TOOL_FIELDS:
            return refuse(400, f"unknown field {path!r}: send functions as tools", "unknown_field", path)
        accepted = (neutral or {}).get(name, ()) if len(detail["loc"]) == 1 else ()
        if accepted:
            values = " or ".join(map(format_json, accepted))
            return refuse(400, f"{path}: is not supported; leave it out, or send {values}", "invalid_value", path)
        return refuse(400, f"unknown field {path!r}: leave it out", "unknown_field", path)
    return refuse(400, f"{path}: {message}" if path else message, "invalid_value", path or None)


def _path_of(detail: ErrorDetails) -> str:
    """Return the path of the field, such as ``messages.0.content.1.image_url.detail``."""
    names = [str(part) for part in detail["loc"] if not str(part).startswith(_TAG_MARK)]
    field = detail.get("ctx", {}).get("field") if detail["type"] == _WRONG_FIELD else None
    return ".".join(name[:_SHOWN_CHARS] for name in [*names, *([field] if field else [])])


def _message_of(detail: ErrorDetails) -> str:
    """Return the message with the found and expected values."""
    context: Mapping[str, Any] = detail.get("ctx", {})
    if detail["type"] not in _WORDS:
        return detail["msg"].removeprefix("Value error, ")
    words = _WORDS[detail["type"]].format(**context)
    found = context.get("actual_length")
    return words if found is None else f"{found} entries; {words}"


def format_json(value: object) -> str:
    """Format a value as JSON."""
    return json.dumps(value)
