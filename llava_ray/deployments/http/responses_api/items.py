"""The items of a Responses request's input: messages, function calls and their results."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag

from llava_ray.deployments.http.closed_model import ClosedModel
from llava_ray.deployments.http.complaints import _TAG_MARK, excerpt, wrong_field
from llava_ray.deployments.http.schema import MAX_PARTS
from llava_ray.deployments.http.tool_fields import CalledFunction

_PARTS = ("input_text", "output_text", "input_image", "refusal")
_OTHER_PARTS = {
    "text": '; send {"type": "input_text", "text": …}',
    "image_url": '; send {"type": "input_image", "image_url": "data:…"}',
    "input_file": "; send text, or images as input_image",
}
_ITEMS = ("message", "function_call", "function_call_output")
_OTHER_ITEMS = {
    "item_reference": "; this service stores no items: send the item itself",
    "reasoning": "; leave it out",
}
# Fields of items as servers return them.
_OF_OUTPUT = frozenset({"id", "status", "phase"})


class InputText(ClosedModel):
    """A piece of text, of a user or of an earlier answer."""

    ignored = frozenset({"annotations", "logprobs", "parsed"})  # the last is added by OpenAI's client

    type: Literal["input_text", "output_text"]
    text: str


class InputImage(ClosedModel):
    """An image, at this place in the message."""

    type: Literal["input_image"]
    image_url: str
    """A data URI, or an address that the service may fetch."""
    detail: Literal["auto", "low", "high", "original"] = "auto"
    """Accepted; the model's own image settings apply."""

    @classmethod
    def prepared(cls, values: dict[str, Any]) -> Mapping[str, Any]:
        """Reject uploaded files, which are not kept here."""
        if "file_id" in values:
            raise wrong_field("file_id", "this service stores no files; send the image as image_url")
        return values


class RefusalPart(ClosedModel):
    """A refusal in an earlier answer."""

    type: Literal["refusal"]
    refusal: str


def _tag(name: str) -> Any:
    return Tag(f"{_TAG_MARK}{name}")


def _part_tag(part: Any) -> str | None:
    kind = part.get("type") if isinstance(part, Mapping) else part.type
    return f"{_TAG_MARK}{'input_text' if kind == 'output_text' else kind}"


def _as_input_part(part: Any) -> Any:
    """Return a part unchanged. Raises an error that names its type and the supported ones."""
    if not isinstance(part, Mapping):
        raise wrong_field("", 'expected a part, an object such as {"type": "input_text", "text": …}')
    kind = part.get("type")
    if isinstance(kind, str) and kind in _PARTS:
        return part
    known = "'input_text' or 'input_image'"
    if kind is None:
        raise wrong_field("type", f"missing; expected {known}")
    hint = _OTHER_PARTS.get(kind, "") if isinstance(kind, str) else ""
    raise wrong_field("type", f"{excerpt(kind)} is no type of part: expected {known}{hint}")


def _as_parts(content: Any) -> Any:
    """Convert a text to parts."""
    if isinstance(content, str):
        return [{"type": "input_text", "text": content}]
    if not isinstance(content, list | tuple):
        raise wrong_field("", "expected a text, or a list of parts")
    return content


InputPart = Annotated[
    Annotated[
        Annotated[InputText, _tag("input_text")]
        | Annotated[InputImage, _tag("input_image")]
        | Annotated[RefusalPart, _tag("refusal")],
        Discriminator(_part_tag),
    ],
    BeforeValidator(_as_input_part),
]
Content = Annotated[
    tuple[InputPart, ...],
    BeforeValidator(_as_parts, json_schema_input_type=str | list[InputPart]),
    Field(max_length=MAX_PARTS),
]


class MessageItem(ClosedModel):
    """A message of the conversation."""

    ignored = _OF_OUTPUT

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: Content


class FunctionCallItem(CalledFunction):
    """A call in an earlier answer."""

    ignored = _OF_OUTPUT | {"parsed_arguments"}

    type: Literal["function_call"]
    call_id: str = Field(min_length=1, max_length=256)


class FunctionResultItem(ClosedModel):
    """The result of an earlier call."""

    ignored = _OF_OUTPUT

    type: Literal["function_call_output"]
    call_id: str = Field(min_length=1, max_length=256)
    output: Content


def _item_tag(item: Any) -> str:
    kind = item.get("type", "message") if isinstance(item, Mapping) else item.type
    return f"{_TAG_MARK}{kind}"


def _as_item(item: Any) -> Any:
    """Return an item unchanged. Raises an error that names its type and the supported ones."""
    if not isinstance(item, Mapping):
        raise wrong_field("", 'expected an item, an object such as {"role": "user", "content": …}')
    kind = item.get("type")
    if kind is None:
        return {**item, "type": "message"}
    if isinstance(kind, str) and kind in _ITEMS:
        return item
    hint = _OTHER_ITEMS.get(kind, "") if isinstance(kind, str) else ""
    raise wrong_field("type", f"{excerpt(kind)} is no type of item: expected {' or '.join(map(repr, _ITEMS))}{hint}")


InputItem = Annotated[
    Annotated[
        Annotated[MessageItem, _tag("message")]
        | Annotated[FunctionCallItem, _tag("function_call")]
        | Annotated[FunctionResultItem, _tag("function_call_output")],
        Discriminator(_item_tag),
    ],
    BeforeValidator(_as_item),
]


def as_items(value: Any) -> Any:
    """Convert a text to a user's message."""
    if isinstance(value, str):
        return [{"type": "message", "role": "user", "content": value}]
    if not isinstance(value, list | tuple):
        raise wrong_field("", "expected a text, or a list of items")
    return value
