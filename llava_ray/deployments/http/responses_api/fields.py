"""The schema of a Responses request: a closed model, so that no field is silently ignored."""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from llava_ray.deployments.http.closed_model import ClosedModel
from llava_ray.deployments.http.complaints import excerpt, wrong_field
from llava_ray.deployments.http.neutral_fields import Neutral
from llava_ray.deployments.http.responses_api.items import InputItem, as_items
from llava_ray.deployments.http.schema import MAX_MESSAGES
from llava_ray.deployments.http.tool_fields import FunctionDefinition, FunctionName

_MAX_TOOLS = 128
_LOGPROBS = "message.output_text.logprobs"
# What clients may ask for that no answer here has.
_NO_EFFECT = frozenset({"reasoning.encrypted_content"})
_SEEDS = 2**63

# Fields that only a service with storage can follow, with the remedy.
_OF_STORAGE = {
    "previous_response_id": "this service stores no responses: send the earlier messages and answers in input",
    "conversation": "this service stores no conversations: send the earlier messages and answers in input",
    "prompt": "this service stores no prompts: send its text as instructions or input",
}


class TextFormat(ClosedModel):
    """The format of the answer's text. A schema is held whether or not it is ``strict``."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = Field(default=None, pattern=r"^[a-zA-Z0-9_-]{1,64}$")
    content: dict[str, Any] | None = Field(default=None, alias="schema")
    description: str | None = None
    strict: bool | None = None

    @model_validator(mode="after")
    def schema_of_its_type(self) -> Self:
        """Require name and schema where they are used, and only there."""
        for field, value in (("name", self.name), ("schema", self.content)):
            if (self.type == "json_schema") != (value is not None):
                words = "missing" if value is None else 'only with type = "json_schema"'
                raise wrong_field(field, words)
        return self


class TextFields(ClosedModel):
    """The fields of ``text``."""

    neutral: ClassVar[Neutral] = {"verbosity": ("medium",)}

    format: TextFormat = Field(default_factory=lambda: TextFormat(type="text"))


class FunctionTool(FunctionDefinition):
    """A function that an answer may call."""

    neutral: ClassVar[Neutral] = {"allowed_callers": (["direct"],), "async": (False,), "defer_loading": (False,)}

    type: Literal["function"]


class NamedFunction(FunctionName):
    """A function by its name."""

    type: Literal["function"]


def _as_tool(value: Any) -> Any:
    """Reject other tools than functions, in words."""
    kind = value.get("type") if isinstance(value, dict) else None
    if isinstance(value, dict) and kind is not None and kind != "function":
        raise wrong_field("type", f"{excerpt(kind)} is no tool of this service: expected 'function'")
    if isinstance(value, dict) and isinstance(value.get("function"), dict):
        raise wrong_field("function", 'expected {"type": "function", "name": …, "parameters": …} in one object')
    return value


def _as_tool_choice(value: Any) -> Any:
    """Check a choice by word, so that a wrong one is told with the known ones."""
    known = '"none", "auto", "required", or {"type": "function", "name": …}'
    if isinstance(value, NamedFunction) or (isinstance(value, str) and value in ("none", "auto", "required")):
        return value
    if isinstance(value, dict) and value.get("type") == "function":
        return NamedFunction.model_validate(value)
    found = value.get("type") if isinstance(value, dict) else value
    raise wrong_field("", f"{excerpt(found)} is no choice: expected {known}")


class ResponseStreamOptions(ClosedModel):
    """Options of a stream."""

    include_obfuscation: bool = False
    """Accepted and of no effect."""


class ResponsesRequest(ClosedModel):
    """``POST /v1/responses``."""

    ignored = frozenset(
        {
            "max_tool_calls",  # of OpenAI's own tools
            "prompt_cache_key",
            "prompt_cache_options",
            "prompt_cache_retention",
            "safety_identifier",
            "service_tier",
            "user",
        }
    )
    neutral: ClassVar[Neutral] = {
        "background": (False,),
        "context_management": ([],),
        "extra_body": ({},),
        "reasoning": ({}, {"effort": "none"}, {"effort": None}, {"summary": None}, {"effort": None, "summary": None}),
        "store": (False,),
        "truncation": ("disabled",),
        "min_p": (0,),
        "frequency_penalty": (0,),
        "presence_penalty": (0,),
        "repetition_penalty": (1,),
    }

    model: str = Field(min_length=1, max_length=512)
    input: Annotated[
        tuple[InputItem, ...],
        BeforeValidator(as_items, json_schema_input_type=str | list[InputItem]),
        Field(min_length=1, max_length=MAX_MESSAGES),
    ]
    instructions: str | None = None
    """The system prompt."""
    max_output_tokens: int | None = Field(default=None, ge=1, le=1_000_000)
    temperature: float = Field(default=1.0, ge=0, le=2)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=-1, le=1_000_000)
    """As in vLLM; 0 and -1 are all tokens."""
    seed: int | None = Field(default=None, ge=-_SEEDS, lt=_SEEDS)
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    include: tuple[str, ...] = Field(default=(), max_length=16)
    text: TextFields = Field(default_factory=TextFields)
    tools: tuple[Annotated[FunctionTool, BeforeValidator(_as_tool)], ...] = Field(default=(), max_length=_MAX_TOOLS)
    tool_choice: Annotated[
        str | NamedFunction | None,
        BeforeValidator(_as_tool_choice, json_schema_input_type=Literal["none", "auto", "required"] | NamedFunction),
    ] = None
    """Default: auto where there are tools."""
    parallel_tool_calls: bool = True
    metadata: dict[str, str] = Field(default_factory=dict, max_length=16)
    """Returned as it came."""
    stream: bool = False
    stream_options: ResponseStreamOptions | None = None

    @classmethod
    def prepared(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Reject what needs storage, with the remedy."""
        for name, words in _OF_STORAGE.items():
            if name in values:
                raise wrong_field(name, words)
        if values.get("store") is True:
            raise wrong_field("store", "this service stores no responses; leave it out, or send false")
        if values.get("background") is True:
            raise wrong_field("background", "this service stores no responses; leave it out, and wait or stream")
        if values.get("truncation") == "auto":
            raise wrong_field("truncation", "nothing is left out of a conversation; shorten input yourself")
        return values

    @model_validator(mode="after")
    def fields_fit_together(self) -> Self:
        """Reject options of what is not asked for, and unknown includes."""
        if self.stream_options is not None and not self.stream:
            raise wrong_field("stream_options", "only allowed with stream = true")
        for index, name in enumerate(self.include):
            if name != _LOGPROBS and name not in _NO_EFFECT:
                raise wrong_field(f"include.{index}", f"{excerpt(name)} is not there to include; known: {_LOGPROBS}")
        if self.top_logprobs and not self.with_logprobs:
            raise wrong_field("top_logprobs", f'only allowed with include = ["{_LOGPROBS}"]')
        return self

    @property
    def with_logprobs(self) -> bool:
        """Return whether the answer has log-probabilities."""
        return _LOGPROBS in self.include
