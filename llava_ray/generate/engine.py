"""What every engine does: take a request, stream its tokens, and stop at once when it is told to.

One engine serves one model, in one process, on its caller's event loop; the heavy steps run elsewhere (a thread, a
process of its own), so that a health check never waits for a prefill.
"""

from collections.abc import AsyncIterator, Collection, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

from llava_ray.chat.conversation import Turn
from llava_ray.errors import RecordError
from llava_ray.images.views import ImageDecoder

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Sampling:
    """How the tokens of one answer are chosen, under the names of OpenAI's API."""

    max_tokens: int = 512
    """At most so many new tokens; the engine refuses a request that its context cannot hold."""
    temperature: float = 0.0
    """0 takes the likeliest token each time."""
    top_p: float = 1.0
    """Only the likeliest tokens whose probabilities add up to this."""
    top_k: int = 0
    """Only so many of the likeliest tokens; 0 for all."""
    stop: tuple[str, ...] = ()
    """Texts that end the answer and are not part of it, beside those of the template."""
    seed: int | None = None
    """The same seed gives the same answer, whoever else is being answered; None draws one."""
    logprobs: int | None = None
    """Of each token its log-probability, and those of so many likeliest ones; None for none."""
    ignore_eos: bool = False
    """Go on to max_tokens whatever the model says: for benchmarks."""


@dataclass(frozen=True)
class GenerationRequest:
    """One conversation to go on with, or one raw prompt."""

    request_id: str
    """Unique among the requests of its engine; what ``cancel`` takes."""
    turns: tuple[Turn, ...] = ()
    """The conversation in LLaVA's form (``<image>`` in a text marks an image); its last turn is the human's."""
    prompt: str | None = None
    """Instead of turns: text that no template is laid around (``/v1/completions``)."""
    images: tuple[bytes, ...] = ()
    """Encoded images in the order of their markers. Already checked for size by who took them from outside."""
    system: str | None = None
    """A system prompt instead of the template's."""
    model: str | None = None
    """Name of a LoRA adapter that the engine holds beside its base; None for the base."""
    sampling: Sampling = field(default_factory=Sampling)


@dataclass(frozen=True)
class TokenLogprob:
    """A token, its text, its natural log-probability before temperature, and the likeliest others."""

    token_id: int
    text: str
    logprob: float
    top: tuple[tuple[int, str, float], ...] = ()
    """(id, text, log-probability) of the likeliest tokens, best first."""


@dataclass(frozen=True)
class GenerationChunk:
    """The next piece of an answer. The last one, and only that, has a finish_reason."""

    text: str
    """New text; never half a character, never the beginning of a stop text that may still come to its end."""
    token_ids: tuple[int, ...]
    """New tokens, the one that ended the answer left out; their text may come with a later chunk."""
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    num_prompt_tokens: int = 0
    """Tokens of the prompt, those of images included."""
    num_cached_images: int = 0
    """Images whose features the engine still knew."""
    queued_s: float = 0.0
    """Seconds that the request waited for its place in the running batch."""


@dataclass(frozen=True)
class EngineStats:
    """What an engine is doing now, and has done since it started; scraped for metrics."""

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


@dataclass(frozen=True)
class ModelCard:
    """What a served model is able to do, for ``/v1/models`` and the page's picker."""

    name: str
    max_model_len: int
    """Tokens of prompt and answer together."""
    vision: bool
    template: str
    adapters: Sequence[str] = ()


def check_unique_request_id(request_id: str, answered: Collection[str]) -> None:
    """Raise RecordError if a request of this id is being answered."""
    if request_id in answered:
        raise RecordError(
            f"a request with the id {request_id!r} is being answered; expected another id.", reason="request_id"
        )


class Engine(Protocol):
    """Continuous batching behind three verbs. Errors: RecordError for what a request got wrong, ModelError for ours."""

    @property
    def card(self) -> ModelCard:
        """Return what the model is able to do."""
        ...

    async def start(self) -> None:
        """Load the model and begin to serve. Raises ModelError."""
        ...

    def generate(self, request: GenerationRequest) -> AsyncIterator[GenerationChunk]:
        """Stream the answer. Leaving the iterator early (``aclose``, a cancelled task) cancels the request.

        Raises RecordError before the first chunk if markers and images differ in number, an image cannot be read, or
        prompt and max_tokens exceed the context.
        """
        ...

    async def cancel(self, request_id: str) -> None:
        """Drop the request between two tokens and free its memory; nothing happens if it has already ended."""
        ...

    def stats(self) -> EngineStats:
        """Return what is going on, without waiting for the model."""
        ...

    def check_health(self) -> None:
        """Raise ModelError if the engine can no longer answer (its loop died)."""
        ...

    async def stop(self) -> None:
        """Cancel what is running and free the model."""
        ...


@runtime_checkable
class DecodesElsewhere(Protocol):
    """An engine that has its images decoded by whom it is told to, so that they can do it no harm."""

    def use_decoder(self, decoder: ImageDecoder) -> None:
        """Have the images of all later requests decoded by ``decoder``."""
        ...
