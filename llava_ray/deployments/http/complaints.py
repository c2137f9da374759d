"""What is wrong with a request, in words that name its field and never repeat what was sent."""

import json
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError

from llava_ray.deployments.http.neutral_fields import TOOL_FIELDS, Neutral
from llava_ray.deployments.refusal import RefusalError, refuse

_SHOWN_CHARS = 60  # of a name in an error message
_TAG_MARK = "\0"  # what the names of a union's members begin with: pydantic puts them into its paths
_WRONG_FIELD = "wrong_field"


def wrong_field(field: str, words: str) -> PydanticCustomError:
    """Return what a validator raises about a field of the object at hand, or with no name about the object itself."""
    return PydanticCustomError(_WRONG_FIELD, "{words}", {"field": field, "words": words})


def excerpt(value: object) -> str:
    """Return a short text of what was found, in quotes; of anything else what it is."""
    return repr(value[:_SHOWN_CHARS]) if isinstance(value, str) else _JSON_NAMES.get(type(value), "an unknown value")


_JSON_NAMES: dict[type, str] = {
    bool: "true or false",
    int: "a number",
    float: "a number",
    list: "a list",
    dict: "an object",
    type(None): "null",
}

# Pydantic's words where they are Python's, by its error types. Lengths are of lists and of texts.
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
    """Put pydantic's first complaint into OpenAI's form; ``neutral`` are the values with which fields are taken."""
    detail = error.errors(include_url=False, include_input=False)[0]
    path = _path_of(detail)
    message = _words_of(detail)
    if detail["type"] == "json_invalid":
        return refuse(400, f"the body is not JSON: {message}", "invalid_json")
    if detail["type"] == "extra_forbidden":
        name = str(detail["loc"][-1])[:_SHOWN_CHARS]
        if name in TOOL_FIELDS:
            return refuse(400, f"unknown field {path!r}: tools and functions are not supported", "unknown_field", path)
        accepted = (neutral or {}).get(name, ()) if len(detail["loc"]) == 1 else ()
        if accepted:
            values = " or ".join(map(written, accepted))
            return refuse(400, f"{path}: is not supported; leave it out, or send {values}", "invalid_value", path)
        return refuse(400, f"unknown field {path!r}: leave it out", "unknown_field", path)
    return refuse(400, f"{path}: {message}" if path else message, "invalid_value", path or None)


def _path_of(detail: ErrorDetails) -> str:
    """Return the field in the request's own names, such as ``messages.0.content.1.image_url.detail``."""
    names = [str(part) for part in detail["loc"] if not str(part).startswith(_TAG_MARK)]
    field = detail.get("ctx", {}).get("field") if detail["type"] == _WRONG_FIELD else None
    return ".".join(name[:_SHOWN_CHARS] for name in [*names, *([field] if field else [])])


def _words_of(detail: ErrorDetails) -> str:
    """Return what was found and expected."""
    context: Mapping[str, Any] = detail.get("ctx", {})
    if detail["type"] not in _WORDS:
        return detail["msg"].removeprefix("Value error, ")
    words = _WORDS[detail["type"]].format(**context)
    found = context.get("actual_length")
    return words if found is None else f"{found} entries; {words}"


def written(value: object) -> str:
    """Write a value as JSON."""
    return json.dumps(value)
