"""Normalisation of messages to one form before validation."""

from collections.abc import Mapping
from typing import Any

from llava_ray.deployments.http.complaints import _TAG_MARK, excerpt, wrong_field
from llava_ray.deployments.http.neutral_fields import ANSWER_NEUTRAL, OF_ANSWERS, is_neutral

# The members of the union of parts, as pydantic's paths name them.
TEXT, IMAGE = f"{_TAG_MARK}text", f"{_TAG_MARK}image_url"
_KINDS = {"text": TEXT, "image_url": IMAGE}

# The names of these parts in other APIs.
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
    """Return the tag of a part in the union."""
    kind = part.get("type") if isinstance(part, Mapping) else getattr(part, "type", None)
    return _KINDS.get(kind) if isinstance(kind, str) else None


def as_part(part: Any) -> Any:
    """Return a part unchanged. Raises an error that names its type and the supported types."""
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
    """Convert a message's content to parts."""
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, list | tuple):
        raise wrong_field("", "expected a text, or a list of parts")
    return content


def as_image_url(value: Any) -> Any:
    """Convert a bare address to an object with ``url``."""
    if isinstance(value, str):
        return {"url": value}
    if isinstance(value, Mapping) and value.get("url") is None:
        raise wrong_field("url", "missing; expected a data: or https: address")
    return value


def as_message(values: dict[str, Any]) -> dict[str, Any]:
    """Normalise an assistant message as servers return it, this one included.

    Missing content is an empty answer; a refusal replaces the content.
    """
    if values.get("role") != "assistant":
        return values
    values = {
        name: value
        for name, value in values.items()
        if name not in OF_ANSWERS and not is_neutral(ANSWER_NEUTRAL, name, value)
    }
    content, refusal = values.get("content", ""), values.get("refusal")
    if isinstance(content, list):
        content = [_as_text(part) for part in content]
    if isinstance(refusal, str):
        if content:
            raise wrong_field("refusal", "the message has content too; send one of them")
        content = values.pop("refusal")
    return {**values, "content": content}


def _as_text(part: Any) -> Any:
    """Convert a refusal part to a text part."""
    if isinstance(part, Mapping) and part.get("type") == "refusal":
        rest = {name: value for name, value in part.items() if name not in ("type", "refusal")}
        return {**rest, "type": "text", "text": part.get("refusal")}
    return part
