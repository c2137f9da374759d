"""Messages as clients and servers write them, brought to one form before they are checked."""

from collections.abc import Mapping
from typing import Any

from llava_ray.deployments.http.complaints import _TAG_MARK, excerpt, wrong_field
from llava_ray.deployments.http.neutral_fields import ANSWER_NEUTRAL, OF_ANSWERS, is_neutral

# The members of the union of parts, as pydantic's paths name them.
TEXT, IMAGE = f"{_TAG_MARK}text", f"{_TAG_MARK}image_url"
_KINDS = {"text": TEXT, "image_url": IMAGE}

# What other APIs call these parts.
_MEANT = {
    "input_text": "text",
    "output_text": "text",
    "image": "image_url",
    "input_image": "image_url",
    "image_pil": "image_url",
    "image_embeds": "image_url",
}
_EXAMPLES = {
    "text": '{"type": "text", "text": …}',
    "image_url": '{"type": "image_url", "image_url": {"url": …}}',
}


def part_kind(part: Any) -> str | None:
    """Return which member of the union a part is."""
    kind = part.get("type") if isinstance(part, Mapping) else getattr(part, "type", None)
    return _KINDS.get(kind) if isinstance(kind, str) else None


def as_part(part: Any) -> Any:
    """Return the part as it is. Raises what names its type, and the types that there are."""
    if part_kind(part) is not None:
        return part
    if not isinstance(part, Mapping):
        raise wrong_field("", f"expected a part, an object such as {_EXAMPLES['text']}")
    kind = part.get("type")
    if kind is None:
        raise wrong_field("type", f"missing; expected {' or '.join(map(repr, _KINDS))}")
    hint = f"; send {_EXAMPLES[_MEANT[kind]]}" if isinstance(kind, str) and kind in _MEANT else ""
    raise wrong_field("type", f"{excerpt(kind)} is no type of part: expected {' or '.join(map(repr, _KINDS))}{hint}")


def as_content(content: Any) -> Any:
    """Return parts, of a text too."""
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, list | tuple):
        raise wrong_field("", "expected a text, or a list of parts")
    return content


def as_image_url(value: Any) -> Any:
    """Take an address for the object that holds it."""
    if isinstance(value, str):
        return {"url": value}
    if isinstance(value, Mapping) and value.get("url") is None:
        raise wrong_field("url", "missing; expected a data: or https: address")
    return value


def as_message(values: dict[str, Any]) -> dict[str, Any]:
    """Read an answer in the form in which servers write it, this one included.

    No content is an empty answer; a refusal is what was said instead of one.
    """
    if values.get("role") != "assistant":
        return values
    values = {
        name: value
        for name, value in values.items()
        if name not in OF_ANSWERS and not is_neutral(ANSWER_NEUTRAL, name, value)
    }
    said, refusal = values.get("content", ""), values.get("refusal")
    if isinstance(said, list):
        said = [_as_text(part) for part in said]
    if isinstance(refusal, str):
        if said:
            raise wrong_field("refusal", "the message has content too; send one of them")
        said = values.pop("refusal")
    return {**values, "content": said}


def _as_text(part: Any) -> Any:
    """Take a part that refuses for a part that says so."""
    if isinstance(part, Mapping) and part.get("type") == "refusal":
        rest = {name: value for name, value in part.items() if name not in ("type", "refusal")}
        return {**rest, "type": "text", "text": part.get("refusal")}
    return part
