"""The interface of all engines: requests in, streams of tokens out, immediate cancellation.

One engine serves one model, in one process, on its caller's event loop; heavy computation runs elsewhere (a thread, a
process of its own), so that a health check never waits for a prefill.
"""

from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from llava_ray.chat.conversation import Turn
from llava_ray.chat.prompt_ends import PromptEnd
from llava_ray.chat.tool_formats import CallDelta
from llava_ray.errors import RecordError
from llava_ray.generate.logprobs import PromptLogprobs, TokenLogprob
from llava_ray.generate.readings import Features, PromptReading

FinishReason = Literal["stop", "length", "tool_calls"]  # engines themselves end with one of the first two


@dataclass(frozen=True)
class Constraint:
    """A set of texts, one of which an answer must be."""

    kind: Literal["json", "regex", "choice", "grammar"]
    text: str
    """A JSON Schema, a regular expression, a JSON list of texts, or a grammar in Lark's or GBNF's syntax."""
    field: str
    """The field of the request, for error messages."""


@dataclass(frozen=True)
class ToolChoice:
    """Whether an answer may or must call the tools of its conversation."""

    mode: Literal["auto", "required", "named"] = "auto"
    name: str = ""
    """The only function that may be called, for ``named``."""
    parallel: bool = True
    """Whether one answer may hold several calls."""


@dataclass(frozen=True)
class Sampling:
    """Sampling settings of one answer, with the names of OpenAI's API."""

    max_tokens: int = 512
    """The most new tokens; the engine rejects a request that its context cannot hold."""
    temperature: float = 0.0
    """0 is greedy."""
    top_p: float = 1.0
    """Only the most likely tokens whose probabilities add up to this."""
    top_k: int = 0
    """Only so many of the most likely tokens; 0 for all."""
    stop: tuple[str, ...] = ()
    """Texts that end the answer and are not part of it, besides the template's."""
    seed: int | None = None
    """The same seed gives the same answer, whatever else is in the batch; None draws one."""
    logprobs: int | None = None
    """Log-probabilities of each token and of so many most likely ones; None for none."""
    ignore_eos: bool = False
    """Generate max_tokens tokens without stopping: for benchmarks."""
    constraint: Constraint | None = None
    """What the answer may be; None for any text."""
    min_p: float = 0.0
    """Only tokens at least this likely, as a share of the likeliest one's probability; 0 for all. Before top_k."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(id, addition to its logit) of tokens, in the prompt maker's vocabulary."""
    presence_penalty: float = 0.0
    """Subtracted from the logits of tokens that the answer has."""
    frequency_penalty: float = 0.0
    """Subtracted from a token's logit as often as the answer has it."""
    repetition_penalty: float = 1.0
    """Divides the logits of tokens that prompt or answer have (multiplies negative ones)."""
    prompt_logprobs: int | None = None
    """Log-probabilities of the prompt's tokens and of so many most likely ones at each place; None for none."""


@dataclass(frozen=True)
class GenerationRequest:
    """A conversation to continue, or a raw prompt."""

    request_id: str
    """Unique among the requests of its engine; the argument of ``cancel``."""
    turns: tuple[Turn, ...] = ()
    """The conversation in LLaVA's form (``<image>`` in a text marks an image); its last turn is the human's."""
    prompt: str | None = None
    """Instead of turns: text without a template (``/v1/completions``)."""
    images: tuple[bytes, ...] = ()
    """Encoded images in the order of their markers. The server has checked their sizes."""
    system: str | None = None
    """A system prompt instead of the template's."""
    model: str | None = None
    """Name of one of the engine's LoRA adapters; None for the base."""
    sampling: Sampling = field(default_factory=Sampling)
    tool_choice: ToolChoice = field(default_factory=ToolChoice)
    """For turns with tools."""
    continue_final_message: bool = False
    """Whether the last turn is the beginning of the answer, which is continued."""
    add_generation_prompt: bool = True
    """Whether the template writes what comes before an answer, unless the last turn is continued."""
    prompt_ids: tuple[int, ...] = ()
    """Instead of turns and prompt: its tokens."""
    add_special_tokens: bool = True
    """Whether a raw prompt that is only read (``ReadsPrompts``) begins with the tokenizer's own token."""
    features: Features | None = None
    """What to return, as one normalised vector, instead of an answer: the language model's last state of the prompt,
    or the mean features of the only image, with neither turns nor prompt."""

    @property
    def prompt_end(self) -> PromptEnd:
        """Return where the prompt of the turns ends."""
        if self.continue_final_message:
            return "continued"
        return "open" if self.add_generation_prompt else "closed"

    @property
    def opens_answer(self) -> bool:
        """Return whether the prompt ends where the template has an answer begin."""
        return self.prompt is None and self.add_generation_prompt and not self.continue_final_message


@dataclass(frozen=True)
class GenerationChunk:
    """The next piece of an answer. The last one, and only that, has a finish_reason."""

    text: str
    """New text; never part of a character, never the beginning of a possible stop text."""
    token_ids: tuple[int, ...]
    """New tokens, the one that ended the answer left out; their text may come with a later chunk."""
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    num_prompt_tokens: int = 0
    """Tokens of the prompt, those of images included."""
    num_cached_images: int = 0
    """Images whose embeddings were in the cache."""
    queued_s: float = 0.0
    """Seconds that the request waited until it joined the running batch."""
    num_cached_tokens: int = 0
    """Tokens of the prompt whose keys and values were in the cache."""
    calls: tuple[CallDelta, ...] = ()
    """Pieces of tool calls, once the service has separated them from the text."""
    prompt_logprobs: PromptLogprobs = ()
    """Of the prompt, in the first piece of an answer whose request asks for them."""
    reading: PromptReading | None = None
    """The result of a request that asks for no answer."""


@dataclass(frozen=True)
class EngineStats:
    """The engine's current load and its counters since the start; scraped for metrics."""

    num_running: int
    num_waiting: int
    kv_tokens_used: int
    kv_tokens_capacity: int
    prompt_tokens: int
    """Since the start, as the rest below."""
    generation_tokens: int
    image_cache_hits: int
    image_cache_queries: int
    num_cancelled: int
    kv_bytes: int = 0
    """Memory of the KV cache, as far as it is known."""
    prefix_cache_queries: int = 0
    """Tokens of all prompts."""
    prefix_cache_hits: int = 0
    """Of them, those whose keys and values were in the cache."""
    prefix_cache_tokens: int = 0
    """Tokens of known text in the cache now."""
    draft_tokens: int = 0
    """Tokens that were guessed (speculative decoding)."""
    accepted_tokens: int = 0
    """Of them, those that were right."""


@dataclass(frozen=True)
class ModelCard:
    """The capabilities of a served model, for ``/v1/models`` and the page's model picker."""

    name: str
    max_model_len: int
    """Tokens of prompt and answer together."""
    vision: bool
    template: str
    adapters: Sequence[str] = ()
    holds_constraints: bool = False
    """Whether the engine holds answers to the ``constraint`` of a request."""
    tool_formats: Mapping[str, str] = field(default_factory=dict)
    """The format of tool calls (``chat.tool_formats``) of each model and adapter whose template has tools."""
    has_features: bool = False
    """Whether the engine returns the ``features`` of a request."""


def check_unique_request_id(request_id: str, answered: Collection[str]) -> None:
    """Check that no running request has this id. Raises RecordError."""
    if request_id in answered:
        raise RecordError(
            f"a request with the id {request_id!r} is being answered; expected another id.", reason="request_id"
        )


class Engine(Protocol):
    """Continuous batching. Errors: RecordError for an invalid request, ModelError for a failure of the engine."""

    @property
    def card(self) -> ModelCard:
        """Return the model's capabilities."""
        ...

    async def start(self) -> None:
        """Load the model and start serving. Raises ModelError."""
        ...

    def generate(self, request: GenerationRequest) -> AsyncIterator[GenerationChunk]:
        """Stream the answer. Leaving the iterator early (``aclose``, a cancelled task) cancels the request.

        Raises RecordError before the first chunk if markers and images differ in number, an image cannot be read, or
        prompt and max_tokens exceed the context.
        """
        ...

    async def cancel(self, request_id: str) -> None:
        """Cancel a request between two tokens and free its memory; do nothing if it has already ended."""
        ...

    def stats(self) -> EngineStats:
        """Return the engine's statistics, without waiting for the model."""
        ...

    def check_health(self) -> None:
        """Check that the engine can still answer. Raises ModelError if its loop died."""
        ...

    async def stop(self) -> None:
        """Cancel all requests and free the model."""
        ...
