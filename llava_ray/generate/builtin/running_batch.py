"""Continuous batching: requests join and leave between two steps, each step decodes one token of every answer."""

import functools
import random
import time
from asyncio import Queue
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from llava_ray.errors import ModelError
from llava_ray.generate.answer_text import AnswerText
from llava_ray.generate.builtin.batching import RowModel, SequenceInput
from llava_ray.generate.builtin.kv_cache import CacheSlot, KvCache, longest_slot
from llava_ray.generate.builtin.packed_linear import pack_linears
from llava_ray.generate.builtin.prompt_images import embed_images, find_overlapping, visible_part
from llava_ray.generate.builtin.scheduling import PrefillChunk, WaitingQueue, split_prefill_chunk
from llava_ray.generate.decoding import decode
from llava_ray.generate.engine import EngineStats, FinishReason, GenerationChunk, GenerationRequest, TokenLogprob
from llava_ray.generate.prompts import Prompt
from llava_ray.generate.row_adapters import RowAdapters
from llava_ray.generate.sampling import compute_logprobs, find_finite_rows, not_finite_error, sample_tokens
from llava_ray.generate.served_adapters import NO_ADAPTERS, ServedAdapters
from llava_ray.generate.settings import EngineSettings
from llava_ray.generate.vision_cache import VisionCache
from llava_ray.model.assembly import LlavaParts

# Prompt tokens of a step. A running stream pauses for one chunk at most: short enough to be unnoticed, long enough to
# use the device well (a CPU is compute-bound at a few hundred rows, a GPU at a few thousand).
_CPU_CHUNK, _GPU_CHUNK = 256, 2048

# The results of a step: the next chunk of an answer, or its error.
StepResults = list[tuple["RunningRequest", GenerationChunk | ModelError]]


@dataclass(eq=False)
class RunningRequest:
    """A request from the moment its prompt is ready to its last token."""

    request: GenerationRequest
    prompt: Prompt
    queue: "Queue[GenerationChunk | Exception | None]"
    text: AnswerText
    draws: random.Random
    row: CacheSlot | None = None
    num_read: int = 0
    """Tokens of the prompt that are in the cache."""
    new_ids: list[int] = field(default_factory=list)
    joined: float = field(default_factory=time.monotonic)
    """When it joined the waiting queue."""
    queued_s: float = 0.0
    """Seconds in the waiting queue, once it is admitted."""
    ended: bool = False
    """Whether its last chunk was delivered or its caller disconnected."""

    @property
    def num_unread(self) -> int:
        """Return the number of prompt tokens that are not in the cache yet."""
        return len(self.prompt.ids) - self.num_read

    @property
    def num_tokens(self) -> int:
        """Return the most tokens of prompt and answer."""
        return len(self.prompt.ids) + self.request.sampling.max_tokens


class RunningBatch:
    """All requests of one model. Only its own thread calls ``add``, ``drop``, ``step`` and ``close``."""

    def __init__(
        self,
        parts: LlavaParts,
        cache: VisionCache,
        settings: EngineSettings,
        served: ServedAdapters = NO_ADAPTERS,
    ) -> None:
        """Prepare the model and its adapters for batching. Raises ModelError if it cannot be batched."""
        self.parts = parts
        self.images = cache
        model = parts.llava.language_model
        self._undo: list[Callable[[], object]] = [served.restore_base]
        try:
            self._undo.append(pack_linears([model, parts.tower.backbone], settings.packed_weight_bytes))
            self.adapters = RowAdapters(model, {adapter.name: adapter.terms for adapter in served.adapters})
            self._undo.append(self.adapters.remove)
            self.model = RowModel(model, self.adapters)
            self._undo.append(self.model.restore)
        except BaseException:
            self._restore_model()
            raise
        on_cpu = model.device.type == "cpu"
        self.chunk = settings.prefill_chunk or (_CPU_CHUNK if on_cpu else _GPU_CHUNK)
        self.max_running = settings.max_running
        capacity = settings.kv_cache_tokens or settings.kv_cache_bytes // self.model.cache_bytes
        self.kv = KvCache(capacity)
        self.max_model_len = _find_max_model_len(parts, settings, capacity)
        self.waiting: WaitingQueue[RunningRequest] = WaitingQueue()
        self.running: list[RunningRequest] = []
        self.num_prompt_tokens = self.num_new_tokens = self.num_cancelled = 0

    def request(
        self, request: GenerationRequest, prompt: Prompt, queue: "Queue[GenerationChunk | Exception | None]"
    ) -> RunningRequest:
        """Build the state of a request, for ``add``."""
        decoder = functools.partial(decode, self.parts.tokenizer)
        text = AnswerText(decoder, prompt.stop_texts, strip=request.prompt is None)
        return RunningRequest(request, prompt, queue, text, random.Random(request.sampling.seed))

    @property
    def has_work(self) -> bool:
        """Return whether a step would do anything."""
        return bool(self.running or self.waiting)

    def add(self, joining: Sequence[RunningRequest]) -> None:
        """Add requests to the waiting queue."""
        for running in joining:
            self.waiting.join(running)

    def drop(self, leaving: Sequence[RunningRequest]) -> None:
        """Remove cancelled requests and free their slots."""
        for running in leaving:
            if running in self.running:
                self.num_cancelled += 1
                self._release(running)
            elif self.waiting.leave(running):
                self.num_cancelled += 1

    def step(self) -> StepResults:
        """Prefill a chunk of new prompts, decode one token of every answer, and return the results."""
        self._admit()
        chunks = split_prefill_chunk(self.running, self.chunk)
        decoding = [running for running in self.running if not running.num_unread]
        self._encode_images(chunks)
        inputs = [self._next_token(running) for running in decoding]
        inputs += [self._prompt_chunk(chunk) for chunk in chunks]
        if not inputs:  # the last request has just been cancelled
            return []
        wanted, logits = self.model.run(inputs)
        for chunk in chunks:
            chunk.request.num_read += chunk.num_tokens
            self.num_prompt_tokens += chunk.num_tokens
        participants = [*decoding, *(chunk.request for chunk in chunks)]
        return self._write([participants[place] for place in wanted], logits) if wanted else []

    def stats(self, *, num_joining: int = 0) -> EngineStats:
        """Return the statistics of the batch."""
        return EngineStats(
            num_running=len(self.running),
            num_waiting=len(self.waiting) + num_joining,
            kv_tokens_used=self.kv.num_reserved,
            kv_tokens_capacity=self.kv.capacity,
            prompt_tokens=self.num_prompt_tokens,
            generation_tokens=self.num_new_tokens,
            image_cache_hits=self.images.num_hits,
            image_cache_queries=self.images.num_queries,
            num_cancelled=self.num_cancelled,
        )

    def close(self) -> None:
        """Drop all requests and restore the model."""
        self.running, self.waiting = [], WaitingQueue()
        self.kv.size_classes.clear()
        self._restore_model()

    def _restore_model(self) -> None:
        while self._undo:
            self._undo.pop()()

    def _admit(self) -> None:
        admitted = self.waiting.admit(self.max_running - len(self.running), self._reserve_slot)
        for running in admitted:
            running.queued_s = time.monotonic() - running.joined
        self.running += admitted

    def _reserve_slot(self, running: RunningRequest) -> bool:
        running.row = self.kv.reserve(running.num_tokens)
        return running.row is not None

    def _release(self, running: RunningRequest) -> None:
        assert running.row is not None
        self.kv.release(running.row)
        running.row = None
        self.running.remove(running)  # last: another thread reads the statistics, and sees its memory freed by then

    def _next_token(self, running: RunningRequest) -> SequenceInput:
        assert running.row is not None
        place = len(running.prompt.ids) + len(running.new_ids) - 1
        return SequenceInput(running.row, place, running.new_ids[-1:], adapter=running.request.model)

    def _prompt_chunk(self, chunk: PrefillChunk[RunningRequest]) -> SequenceInput:
        running = chunk.request
        assert running.row is not None
        start, end = chunk.slots
        return SequenceInput(
            running.row,
            start,
            running.prompt.ids[start:end],
            wants_next=end == len(running.prompt.ids),
            is_prompt=True,
            images=[visible_part(image, start, end) for image in find_overlapping(running.prompt.images, start, end)],
            adapter=running.request.model,
        )

    def _encode_images(self, chunks: Sequence[PrefillChunk[RunningRequest]]) -> None:
        """Run the tower once over all images that a step needs and that are not cached."""
        begun = [
            (chunk.request.prompt, image)
            for chunk in chunks
            for image in find_overlapping(chunk.request.prompt.images, *chunk.slots)
            if image.embeddings is None
        ]
        unknown = {image.key: image for _, image in begun}
        if not unknown:
            return
        for key, embeddings in zip(unknown, embed_images(list(unknown.values())), strict=True):
            unknown[key].embeddings = embeddings
            self.images.keep(key, embeddings)
        for prompt, image in begun:
            prompt.num_cached_images += image is not unknown[image.key]  # computed for another request of this step
            image.embeddings, image.views = unknown[image.key].embeddings, None

    def _write(self, decoding: Sequence[RunningRequest], logits: Tensor) -> StepResults:
        finite = find_finite_rows(logits)
        results: StepResults = []
        if not all(finite):
            results += [
                (running, self._fail(running)) for running, good in zip(decoding, finite, strict=True) if not good
            ]
            good_rows = [row for row, good in enumerate(finite) if good]
            decoding, logits = [decoding[row] for row in good_rows], logits[good_rows]
        return results + self._sample(decoding, logits) if decoding else results

    def _fail(self, running: RunningRequest) -> ModelError:
        """End a request whose logits are not finite; the others continue."""
        running.ended = True
        self._release(running)
        return not_finite_error(f"token {len(running.new_ids) + 1} of this answer")

    def _sample(self, decoding: Sequence[RunningRequest], logits: Tensor) -> StepResults:
        samplings = [running.request.sampling for running in decoding]
        draws = [running.draws.random() if running.request.sampling.temperature else 0.0 for running in decoding]
        tokens = sample_tokens(logits, samplings, draws)
        with_logprobs = [row for row, sampling in enumerate(samplings) if sampling.logprobs is not None]
        logprobs: dict[int, TokenLogprob] = {}
        if with_logprobs:
            most = max(samplings[row].logprobs or 0 for row in with_logprobs)
            found = compute_logprobs(logits[with_logprobs], [tokens[row] for row in with_logprobs], most)
            for row, (mine, best) in zip(with_logprobs, found, strict=True):
                logprobs[row] = self._logprob(tokens[row], mine, best[: samplings[row].logprobs])
        results: StepResults = []
        for row, (running, token) in enumerate(zip(decoding, tokens, strict=True)):
            chunk = self._append(running, token, logprobs.get(row))
            if chunk.finish_reason is not None:
                running.ended = True
                self._release(running)
            results.append((running, chunk))
        return results

    def _append(self, running: RunningRequest, token: int, logprob: TokenLogprob | None) -> GenerationChunk:
        """Append a token to an answer, or end the answer with it."""
        ids: tuple[int, ...] = ()
        reason: FinishReason | None = None
        if token in running.prompt.stops.ids:
            text, reason = running.text.finish(), "stop"
        else:
            text = running.text.push(token)
            if running.text.stopped:
                reason = "stop"
            else:
                ids = (token,)
                running.new_ids.append(token)
                self.num_new_tokens += 1
                if len(running.new_ids) == running.request.sampling.max_tokens:
                    text, reason = text + running.text.finish(), "length"
        return GenerationChunk(
            text,
            ids,
            (logprob,) if ids and logprob is not None else (),
            reason,
            len(running.prompt.ids),
            running.prompt.num_cached_images,
            running.queued_s,
        )

    def _logprob(self, token: int, logprob: float, best: Sequence[tuple[int, float]]) -> TokenLogprob:
        decode = self.parts.tokenizer.decode
        top = tuple((other, str(decode([other])), value) for other, value in best)
        return TokenLogprob(token, str(decode([token])), logprob, top)


def _find_max_model_len(parts: LlavaParts, settings: EngineSettings, capacity: int) -> int:
    """Return the most tokens of prompt and answer. Raises ModelError for more than the model's positions."""
    positions = parts.language_config.get_text_config().to_dict().get("max_position_embeddings")
    wanted = settings.max_model_len or positions or parts.manifest.model_max_length
    if positions is not None and wanted > positions:
        raise ModelError(f"max_model_len is {wanted}, but the language model has {positions} positions; set it lower.")
    if not longest_slot(capacity):
        raise ModelError(f"the KV cache holds {capacity} tokens, less than one slot; give it more memory.")
    return int(min(wanted, longest_slot(capacity)))
