"""Schemas of requests that ask for no answer: embeddings, and tokens in vLLM's form."""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, PlainValidator, model_validator

from llava_ray.deployments.http.closed_model import ClosedModel
from llava_ray.deployments.http.complaints import excerpt, wrong_field
from llava_ray.deployments.http.neutral_fields import Neutral
from llava_ray.deployments.http.schema import MAX_MESSAGES, ChatMessage
from llava_ray.deployments.http.tool_fields import ToolFields

MAX_INPUTS = 2048  # as OpenAI's
_IDS = 2**31

_TokenId = Annotated[int, Field(ge=0, lt=_IDS)]
_Inputs = tuple[str, ...] | tuple[tuple[int, ...], ...]
_InputSchema = (
    Annotated[str, Field(min_length=1)]
    | Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1, max_length=MAX_INPUTS)]
    | Annotated[list[_TokenId], Field(min_length=1)]
    | Annotated[list[Annotated[list[_TokenId], Field(min_length=1)]], Field(min_length=1, max_length=MAX_INPUTS)]
)


def _as_inputs(value: Any) -> _Inputs:
    """Return texts, or lists of tokens; one alone becomes a list of one."""
    if isinstance(value, str):
        return (_as_text(value, ""),)
    if not isinstance(value, list | tuple):
        raise wrong_field("", "expected a text, a list of texts, a list of tokens, or a list of such lists")
    if not value:
        raise wrong_field("", "0 entries; at least 1 entries")
    if isinstance(value[0], int):
        return (_as_ids(value, ""),)
    if len(value) > MAX_INPUTS:
        raise wrong_field("", f"{len(value)} entries; at most {MAX_INPUTS} entries")
    if isinstance(value[0], str):
        return tuple(_as_text(text, str(index)) for index, text in enumerate(value))
    return tuple(_as_ids(ids, str(index)) for index, ids in enumerate(value))


def _as_text(value: Any, place: str) -> str:
    if not isinstance(value, str):
        raise wrong_field(place, f"expected a text like the first entry, not {excerpt(value)}")
    if not value:
        raise wrong_field(place, "an empty text; expected at least one character")
    return value


def _as_ids(value: Any, place: str) -> tuple[int, ...]:
    if not isinstance(value, list | tuple) or not value:
        raise wrong_field(place, "expected a text, or a list of tokens that is not empty")
    for index, token in enumerate(value):
        if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < _IDS:
            raise wrong_field(f"{place}.{index}".lstrip("."), "expected a token, a number from 0")
    return tuple(value)


class EmbeddingsRequest(ClosedModel):
    """``POST /v1/embeddings``."""

    ignored = frozenset({"user"})
    neutral: ClassVar[Neutral] = {
        "add_special_tokens": (True,),
        "extra_body": ({},),
        "normalize": (True,),
        "priority": (0,),
        "use_activation": (True,),
    }

    model: str = Field(min_length=1, max_length=512)
    input: Annotated[_Inputs, PlainValidator(_as_inputs, json_schema_input_type=_InputSchema)] = ()
    """Texts or tokens, one vector each; for features of images their data URIs or addresses."""
    messages: tuple[ChatMessage, ...] = Field(default=(), max_length=MAX_MESSAGES)
    """Instead of input, as in vLLM: a chat, one vector; for features of images one message of images."""
    features: Literal["language", "projector", "tower"] = "language"
    """The language model's state at the last token, or the mean of an image's features behind or before the
    projector."""
    encoding_format: Literal["float", "base64"] = "float"

    @classmethod
    def prepared(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Reject dimensions: the features of these models have one length."""
        if "dimensions" in values:
            raise wrong_field("dimensions", "these vectors have one length and are not cut; leave it out")
        return values

    @model_validator(mode="after")
    def one_input(self) -> Self:
        """Require either input or messages, and images where their features are wanted."""
        if bool(self.input) == bool(self.messages):
            raise wrong_field("input", "not together with messages" if self.input else "missing; or send messages")
        if self.features == "language":
            return self
        if self.input and not isinstance(self.input[0], str):
            raise wrong_field("input", f"expected images, as data URIs or addresses, for features = {self.features!r}")
        if len(self.messages) > 1:
            raise wrong_field("messages", f"expected one message of images for features = {self.features!r}")
        for index, part in enumerate(self.messages[0].parts if self.messages else ()):
            if part.type != "image_url":
                raise wrong_field(f"messages.0.content.{index}", f"expected an image for features = {self.features!r}")
        if self.messages and not self.messages[0].parts:
            raise wrong_field("messages.0.content", f"expected an image for features = {self.features!r}")
        return self


class TokenizeRequest(ToolFields):
    """``POST /tokenize``."""

    neutral: ClassVar[Neutral] = {"chat_template_kwargs": ({},), "extra_body": ({},), "mm_processor_kwargs": ({},)}

    model: str | None = Field(default=None, min_length=1, max_length=512)
    """Default: the first."""
    prompt: str | None = None
    messages: tuple[ChatMessage, ...] = Field(default=(), max_length=MAX_MESSAGES)
    add_special_tokens: bool | None = None
    """For a prompt, by default true; messages are written by the model's template alone."""
    return_token_strs: bool = False
    add_generation_prompt: bool = True
    continue_final_message: bool = False

    @model_validator(mode="after")
    def one_prompt(self) -> Self:
        """Require either a prompt or messages, and only their fields."""
        if (self.prompt is None) == (not self.messages):
            raise wrong_field("prompt", "missing; or send messages" if self.prompt is None else "not with messages")
        if self.messages and self.add_special_tokens:
            raise wrong_field("add_special_tokens", "only with prompt: the template of messages writes all tokens")
        if self.prompt is not None and self.tools:
            raise wrong_field("tools", "only with messages")
        return self


class DetokenizeRequest(ClosedModel):
    """``POST /detokenize``."""

    model: str | None = Field(default=None, min_length=1, max_length=512)
    """Default: the first."""
    tokens: tuple[Annotated[int, Field(strict=True, ge=-_IDS, lt=_IDS)], ...]
