"""The request fields that change how tokens are chosen, by the names of OpenAI's API and of vLLM's."""

from typing import Annotated, Any, Self

from pydantic import BeforeValidator, Field, WithJsonSchema, model_validator

from llava_ray.deployments.http.closed_model import ClosedModel
from llava_ray.deployments.http.complaints import wrong_field
from llava_ray.generate.sampling import MAX_BIAS, MAX_BIASES, MAX_PENALTY

MAX_TOP_LOGPROBS = 20
_MAX_DIGITS = 9  # of a token's id


def as_biases(value: Any) -> tuple[tuple[int, float], ...]:
    """Convert an object of biases by token id, each id a text, to pairs. Raises an error that names the field alone."""
    if not isinstance(value, dict):
        raise wrong_field("", "expected an object of token ids with a number each")
    if len(value) > MAX_BIASES:
        raise wrong_field("", f"{len(value)} entries; at most {MAX_BIASES} entries")
    return tuple(_as_bias(name, bias) for name, bias in value.items())


def _as_bias(name: Any, bias: Any) -> tuple[int, float]:
    is_id = isinstance(name, str) and name.isascii() and name.isdigit() and len(name) <= _MAX_DIGITS
    if not is_id or str(int(name)) != name:
        raise wrong_field("", 'expected token ids as texts, such as "1234"')
    is_number = isinstance(bias, int | float) and not isinstance(bias, bool)
    if not is_number or not abs(bias) <= MAX_BIAS:  # NaN neither
        raise wrong_field("", f"expected a number from -{MAX_BIAS:g} to {MAX_BIAS:g} for each token id")
    return int(name), float(bias)


_BIASES = WithJsonSchema(
    {"type": "object", "additionalProperties": {"type": "number", "minimum": -MAX_BIAS, "maximum": MAX_BIAS}}
)
_Penalty = Annotated[float, Field(ge=-MAX_PENALTY, le=MAX_PENALTY, strict=True)]


class SamplingFields(ClosedModel):
    """The fields of chats and completions alike."""

    min_p: float = Field(default=0.0, ge=0, le=1, strict=True)
    presence_penalty: _Penalty = 0.0
    frequency_penalty: _Penalty = 0.0
    repetition_penalty: float = Field(default=1.0, gt=0, strict=True)
    logit_bias: Annotated[tuple[tuple[int, float], ...], BeforeValidator(as_biases), _BIASES] = ()
    """Numbers by token id; an id is written as a text."""
    prompt_logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS, strict=True)


class PromptEndFields(ClosedModel):
    """The fields that say where the prompt of a chat ends."""

    add_generation_prompt: bool = Field(default=True, strict=True)
    continue_final_message: bool = Field(default=False, strict=True)

    @model_validator(mode="after")
    def one_end(self) -> Self:
        """Reject a prompt that is to end in two places, as vLLM does."""
        asks_for_both = self.add_generation_prompt and "add_generation_prompt" in self.model_fields_set
        if self.continue_final_message and asks_for_both:
            raise wrong_field(
                "continue_final_message",
                "not together with add_generation_prompt = true: the last message is continued, or a new one begun",
            )
        return self
