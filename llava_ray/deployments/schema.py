"""What clients send, in OpenAI's form: closed models, so that nothing asked for is silently left out."""

from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from llava_ray.deployments.refusal import RefusalError, refuse

MAX_STOPS = 4
MAX_STOP_CHARS = 256
MAX_TOP_LOGPROBS = 20
MAX_MESSAGES = 1000
MAX_PARTS = 256
SEEDS = 2**63
SHOWN_CHARS = 60  # of a value in an error message

# Accepted and of no effect here; OpenAI's clients and the programs built on them send these.
IGNORED = {
    "user",
    "store",
    "metadata",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "parallel_tool_calls",
}

Stops = Annotated[
    tuple[Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)], ...],
    BeforeValidator(lambda value: (value,) if isinstance(value, str) else () if value is None else value),
    Field(max_length=MAX_STOPS),
]


class Closed(BaseModel):
    """Refuses unknown keys and numbers that are none; its errors never repeat what was sent."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, hide_input_in_errors=True)


class ImageUrl(Closed):
    """Where an image is, or the image itself as a data URI."""

    url: str
    detail: Literal["auto", "low", "high"] = "auto"
    """Accepted; the model's own image settings decide."""


class TextPart(Closed):
    """A piece of text."""

    type: Literal["text"]
    text: str


class ImagePart(Closed):
    """An image, at this place in the message."""

    type: Literal["image_url"]
    image_url: Annotated[ImageUrl, BeforeValidator(lambda value: {"url": value} if isinstance(value, str) else value)]


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class Message(Closed):
    """One message of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[tuple[Part, ...], Field(max_length=MAX_PARTS)]
    name: str | None = None

    @property
    def parts(self) -> tuple[TextPart | ImagePart, ...]:
        """Return the content as parts, whichever form it came in."""
        return (TextPart(type="text", text=self.content),) if isinstance(self.content, str) else self.content


class StreamOptions(Closed):
    """What a stream says beside the answer."""

    include_usage: bool = False
    include_obfuscation: bool = False
    """Accepted and of no effect."""


class GenerationFields(Closed):
    """What chats and completions have in common."""

    model: str = Field(min_length=1, max_length=512)
    temperature: float = Field(default=1.0, ge=0, le=2)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=-1, le=1_000_000)
    """As in vLLM; 0 and -1 are all tokens."""
    max_tokens: int | None = Field(default=None, ge=1, le=1_000_000)
    n: int = Field(default=1, ge=1, le=128)
    stop: Stops = ()
    seed: int | None = Field(default=None, ge=-SEEDS, lt=SEEDS)
    stream: bool = False
    stream_options: StreamOptions | None = None
    ignore_eos: bool = False
    """As in vLLM, for benchmarks."""
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[str, float] | None = None

    @model_validator(mode="before")
    @classmethod
    def known(cls, values: Any) -> Any:
        """Leave out what has no effect; a null is the same as nothing."""
        if not isinstance(values, dict):
            raise ValueError("expected a JSON object")  # noqa: TRY004 - pydantic counts only ValueError as a refusal
        return {key: value for key, value in values.items() if value is not None and key not in IGNORED}

    @field_validator("presence_penalty", "frequency_penalty")
    @classmethod
    def no_penalty(cls, value: float) -> float:
        """Refuse what would be ignored."""
        if value:
            raise ValueError("penalties are not supported; leave it out or send 0")
        return value

    @field_validator("logit_bias")
    @classmethod
    def no_bias(cls, value: dict[str, float] | None) -> dict[str, float] | None:
        """Refuse what would be ignored."""
        if value:
            raise ValueError("is not supported; leave it out")
        return value

    @model_validator(mode="after")
    def options_of_streams(self) -> Self:
        """Refuse stream_options without stream, as OpenAI does."""
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: only allowed with stream = true")
        return self

    @property
    def include_usage(self) -> bool:
        """Whether the last event of a stream counts tokens."""
        return self.stream_options is not None and self.stream_options.include_usage


class ResponseFormat(Closed):
    """Only plain text is written."""

    type: Literal["text"]


class ChatRequest(GenerationFields):
    """``POST /v1/chat/completions``."""

    messages: tuple[Message, ...] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_completion_tokens: int | None = Field(default=None, ge=1, le=1_000_000)
    logprobs: bool = False
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)
    response_format: ResponseFormat | None = None

    @model_validator(mode="after")
    def top_needs_logprobs(self) -> Self:
        """Refuse top_logprobs alone, as OpenAI does."""
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs: only allowed with logprobs = true")
        return self


class CompletionRequest(GenerationFields):
    """``POST /v1/completions``: text to go on with, no template around it."""

    prompt: str = Field(min_length=1)
    logprobs: int | None = Field(default=None, ge=0, le=5)
    echo: bool = False

    @model_validator(mode="before")
    @classmethod
    def one_prompt(cls, values: Any) -> Any:
        """Take a list of one prompt, as some clients send it."""
        prompt = values.get("prompt") if isinstance(values, dict) else None
        return {**values, "prompt": prompt[0]} if isinstance(prompt, list) and len(prompt) == 1 else values

    @field_validator("echo")
    @classmethod
    def no_echo(cls, value: bool) -> bool:
        """Refuse what would be ignored."""
        if value:
            raise ValueError("is not supported; put the prompt in front of the answer yourself")
        return value


Request = TypeVar("Request", bound=GenerationFields)


def read_request(kind: type[Request], body: bytes) -> Request:
    """Read and check a body. Raises RefusalError (400) that names the field, what was expected and what to do."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        raise in_words(error) from None  # its context would hold the whole payload


def in_words(error: ValidationError) -> RefusalError:
    """Put pydantic's first complaint into OpenAI's form."""
    detail = error.errors(include_url=False, include_input=False, include_context=False)[0]
    message = detail["msg"].removeprefix("Value error, ")
    # A union's member and a discriminator's value stand in the path, but not in the request.
    path = ".".join(
        str(part) for part in detail["loc"] if part not in ("str", "text", "image_url") or detail["loc"][-1] == part
    )
    if detail["type"] == "json_invalid":
        return refuse(400, f"the body is not JSON: {message}", "invalid_json")
    if detail["type"] == "extra_forbidden":
        name = str(detail["loc"][-1])[:SHOWN_CHARS]
        known = (
            "tools and functions are not supported" if name in ("tools", "tool_choice", "functions") else "leave it out"
        )
        return refuse(400, f"unknown field {path[:SHOWN_CHARS]!r}: {known}", "unknown_field", name)
    if not path:
        path, _, rest = message.partition(": ")
        return refuse(400, message, "invalid_value", path if rest else None)
    return refuse(400, f"{path}: {message}", "invalid_value", path)
