"""Request schemas in OpenAI's form: closed models, so that no field is silently ignored."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

from pydantic import BeforeValidator, Discriminator, Field, Tag, ValidationError, model_validator

from llava_ray.deployments.http.closed_model import ClosedModel
from llava_ray.deployments.http.complaints import describe_invalid_request, wrong_field
from llava_ray.deployments.http.constraint_fields import ConstraintFields
from llava_ray.deployments.http.message_fields import (
    IMAGE,
    TEXT,
    as_content,
    as_image_url,
    as_message,
    as_part,
    part_kind,
)
from llava_ray.deployments.http.neutral_fields import (
    IGNORED,
    NEUTRAL,
    OF_CHATS,
    OF_COMPLETIONS,
    OF_PARTS,
    OF_STREAMS,
    Neutral,
)
from llava_ray.deployments.http.sampling_fields import MAX_TOP_LOGPROBS, PromptEndFields, SamplingFields
from llava_ray.deployments.http.tool_fields import CalledTool, ToolFields

__all__ = ["ChatRequest", "CompletionRequest", "describe_invalid_request", "read_request"]

_MAX_STOPS = 4
_MAX_STOP_CHARS = 256
MAX_MESSAGES = 1000
MAX_PARTS = 256
_SEEDS = 2**63


def _as_texts(value: Any) -> Any:
    """Convert one text to a list of one."""
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, list | tuple):
        raise ValueError("expected a text, or a list of texts")  # noqa: TRY004 - pydantic counts only ValueError
    return value


_Stop = Annotated[str, Field(min_length=1, max_length=_MAX_STOP_CHARS)]
_Stops = Annotated[
    tuple[_Stop, ...],
    BeforeValidator(_as_texts, json_schema_input_type=_Stop | tuple[_Stop, ...]),
    Field(max_length=_MAX_STOPS),
]


class ImageUrl(ClosedModel):
    """An image's address, or the image as a data URI."""

    ignored = OF_PARTS

    url: str
    detail: Literal["auto", "low", "high"] = "auto"
    """Accepted; the model's own image settings apply."""


class TextPart(ClosedModel):
    """A piece of text."""

    ignored = OF_PARTS

    type: Literal["text"]
    text: str


class ImagePart(ClosedModel):
    """An image, at this place in the message."""

    ignored = OF_PARTS

    type: Literal["image_url"]
    image_url: Annotated[ImageUrl, BeforeValidator(as_image_url, json_schema_input_type=str | ImageUrl)]


_Part = Annotated[
    Annotated[Annotated[TextPart, Tag(TEXT)] | Annotated[ImagePart, Tag(IMAGE)], Discriminator(part_kind)],
    BeforeValidator(as_part),
]


class ChatMessage(ClosedModel):
    """One message of a chat."""

    ignored = frozenset({"cache_control"})

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[
        tuple[_Part, ...],
        BeforeValidator(as_content, json_schema_input_type=str | tuple[_Part, ...]),
        Field(max_length=MAX_PARTS),
    ]
    name: str | None = None
    tool_calls: tuple[CalledTool, ...] = Field(default=(), max_length=MAX_PARTS)
    """The calls of an assistant's message, behind its content."""
    tool_call_id: str | None = Field(default=None, min_length=1, max_length=256)
    """The call that a tool's message answers."""

    @classmethod
    def prepared(cls, values: dict[str, Any]) -> Mapping[str, Any]:
        """Normalise an assistant message as servers return it."""
        return as_message(values)

    @model_validator(mode="after")
    def fields_of_tools(self) -> Self:
        """Reject calls of other roles than the assistant's, and results without their call."""
        if self.tool_calls and self.role != "assistant":
            raise wrong_field("tool_calls", f"a {self.role} message calls no tools; only an assistant's does")
        if (self.tool_call_id is None) == (self.role == "tool"):
            words = "missing; expected the id of the call that this message answers"
            raise wrong_field("tool_call_id", words if self.role == "tool" else "only a tool message has one")
        return self

    @property
    def parts(self) -> tuple[TextPart | ImagePart, ...]:
        """Return the content as parts."""
        return self.content


class StreamOptions(ClosedModel):
    """Options of a stream."""

    neutral = OF_STREAMS

    include_usage: bool = False
    include_obfuscation: bool = False
    """Accepted and of no effect."""


class GenerationFields(ConstraintFields, SamplingFields):
    """The common fields of chats and completions."""

    ignored = IGNORED

    model: str = Field(min_length=1, max_length=512)
    temperature: float = Field(default=1.0, ge=0, le=2)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=-1, le=1_000_000)
    """As in vLLM; 0 and -1 are all tokens."""
    max_tokens: int | None = Field(default=None, ge=1, le=1_000_000)
    n: int = Field(default=1, ge=1, le=128)
    stop: _Stops = ()
    seed: int | None = Field(default=None, ge=-_SEEDS, lt=_SEEDS)
    stream: bool = False
    stream_options: StreamOptions | None = None
    ignore_eos: bool = False
    """As in vLLM, for benchmarks."""

    @model_validator(mode="after")
    def options_of_streams(self) -> Self:
        """Reject stream_options without stream, as OpenAI does."""
        if self.stream_options is not None and not self.stream:
            raise wrong_field("stream_options", "only allowed with stream = true")
        return self

    @model_validator(mode="after")
    def prompt_logprobs_of_whole_answers(self) -> Self:
        """Reject prompt_logprobs in a stream, as vLLM does."""
        if self.prompt_logprobs is not None and self.stream:
            raise wrong_field("prompt_logprobs", "not together with stream = true")
        return self

    @property
    def include_usage(self) -> bool:
        """Return whether the last event of a stream has token counts."""
        return self.stream_options is not None and self.stream_options.include_usage


class ChatRequest(GenerationFields, ToolFields, PromptEndFields):
    """``POST /v1/chat/completions``."""

    neutral: ClassVar[Neutral] = {**NEUTRAL, **OF_CHATS}

    messages: tuple[ChatMessage, ...] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_completion_tokens: int | None = Field(default=None, ge=1, le=1_000_000)
    logprobs: bool = False
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)

    @model_validator(mode="after")
    def top_needs_logprobs(self) -> Self:
        """Reject top_logprobs without logprobs, as OpenAI does."""
        if self.top_logprobs and not self.logprobs:
            raise wrong_field("top_logprobs", "only allowed with logprobs = true")
        return self

    @model_validator(mode="after")
    def tools_or_constraint(self) -> Self:
        """Reject a constraint of answers that may call tools: it would forbid the calls."""
        constraint = self.constraint()
        if constraint is not None and self.offered_tools:
            raise wrong_field(
                constraint.field.partition(".")[0],
                'not together with tools that may be called: send it with the tool results, with tool_choice = "none"',
            )
        return self


class CompletionRequest(GenerationFields):
    """``POST /v1/completions``: text to continue, without a template."""

    neutral: ClassVar[Neutral] = {**NEUTRAL, **OF_COMPLETIONS}

    prompt: str = Field(min_length=1)
    logprobs: int | None = Field(default=None, ge=0, le=5)

    @classmethod
    def prepared(cls, values: dict[str, Any]) -> Mapping[str, Any]:
        """Accept a list of one prompt, as some clients send it."""
        prompt = values.get("prompt")
        if not isinstance(prompt, list):
            return values
        if len(prompt) != 1 or not isinstance(prompt[0], str):
            raise wrong_field("prompt", "expected a text, or a list of one text; send several in several requests")
        return {**values, "prompt": prompt[0]}


Request = TypeVar("Request", bound=ClosedModel)


def read_request(kind: type[Request], body: bytes) -> Request:
    """Parse and validate a body. Raises RefusalError (400) that names the field, the expectation and the remedy."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        raise describe_invalid_request(error, kind.neutral) from None  # the context would hold the whole payload
