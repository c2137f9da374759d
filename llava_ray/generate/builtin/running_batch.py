"""The running batch: requests join and leave between two steps, each step brings those that write one token on."""

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
from llava_ray.generate.builtin.kv_cache import CacheSlot, KvCache, longest_row
from llava_ray.generate.builtin.packed_linear import pack_linears
from llava_ray.generate.builtin.prompt_images import embed_images, overlapping, visible_part
from llava_ray.generate.builtin.scheduling import PrefillChunk, WaitingQueue, share_chunk
from llava_ray.generate.decoding import decode
from llava_ray.generate.engine import EngineStats, FinishReason, GenerationChunk, GenerationRequest, TokenLogprob
from llava_ray.generate.prompts import Prompt
from llava_ray.generate.row_adapters import RowAdapters
from llava_ray.generate.sampling import choose_tokens, find_finite_rows, find_logprobs, not_finite
from llava_ray.generate.served_adapters import NO_ADAPTERS, ServedAdapters
from llava_ray.generate.settings import EngineSettings
from llava_ray.generate.vision_cache import VisionCache
from llava_ray.model.assembly import LlavaParts

_CPU_CHUNK, _GPU_CHUNK = 256, 2048

# What a step has for those who wait: the next piece of an answer, or why there is none.
Told = list[tuple["RunningRequest", GenerationChunk | ModelError]]


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
    """Tokens of the prompt that are in the row."""
    new_ids: list[int] = field(default_factory=list)
    joined: float = field(default_factory=time.monotonic)
    """When it began to wait for a place."""
    queued_s: float = 0.0
    """How long it waited, once it has one."""
    ended: bool = False
    """Whether it has its last chunk, or nobody waits for it any more."""

    @property
    def num_unread(self) -> int:
        """Count the tokens of the prompt that the model has still to read."""
        return len(self.prompt.ids) - self.num_read

    @property
    def num_tokens(self) -> int:
        """Count the tokens that it may come to."""
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
        """Take the model over, with the adapters beside it. Raises ModelError if it cannot be batched."""
        self.parts = parts
        self.images = cache
        model = parts.llava.language_model
        self._undo: list[Callable[[], object]] = [served.put_back]
        try:
            self._undo.append(pack_linears([model, parts.tower.backbone], settings.packed_weight_bytes))
            adapters = RowAdapters(model, {adapter.name: adapter.terms for adapter in served.adapters})
            self._undo.append(adapters.take_off)
            self.model = RowModel(model, adapters)
            self._undo.append(self.model.give_back)
        except BaseException:
            self._give_back()
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
        """Return a request that ``add`` takes."""
        decoder = functools.partial(decode, self.parts.tokenizer)
        text = AnswerText(decoder, prompt.stop_texts, strip=request.prompt is None)
        return RunningRequest(request, prompt, queue, text, random.Random(request.sampling.seed))

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self.running or self.waiting)

    def add(self, joining: Sequence[RunningRequest]) -> None:
        """Let requests wait for a place."""
        for running in joining:
            self.waiting.join(running)

    def drop(self, leaving: Sequence[RunningRequest]) -> None:
        """Free what cancelled requests hold."""
        for running in leaving:
            if running in self.running:
                self._release(running)
                self.num_cancelled += 1
            elif self.waiting.leave(running):
                self.num_cancelled += 1

    def step(self) -> Told:
        """Read a chunk of new prompts and bring every answer one token on; return what there is to tell."""
        self._admit()
        readings = share_chunk(self.running, self.chunk)
        writing = [running for running in self.running if not running.num_unread]
        self._encode_images(readings)
        works = [self._next_token(running) for running in writing]
        works += [self._prompt_chunk(reading) for reading in readings]
        if not works:  # the last request has just been cancelled
            return []
        wanted, logits = self.model.run(works)
        for reading in readings:
            reading.request.num_read += reading.num_tokens
            self.num_prompt_tokens += reading.num_tokens
        doing = [*writing, *(reading.request for reading in readings)]
        return self._write([doing[place] for place in wanted], logits) if wanted else []

    def stats(self, *, num_joining: int = 0) -> EngineStats:
        """Return what is going on."""
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
        """Forget everything, and leave the model as it was."""
        self.running, self.waiting = [], WaitingQueue()
        self.kv.shelves.clear()
        self._give_back()

    def _give_back(self) -> None:
        while self._undo:
            self._undo.pop()()

    def _admit(self) -> None:
        admitted = self.waiting.admit(self.max_running - len(self.running), self._find_room)
        for running in admitted:
            running.queued_s = time.monotonic() - running.joined
        self.running += admitted

    def _find_room(self, running: RunningRequest) -> bool:
        running.row = self.kv.reserve(running.num_tokens)
        return running.row is not None

    def _release(self, running: RunningRequest) -> None:
        assert running.row is not None
        self.running.remove(running)
        self.kv.release(running.row)
        running.row = None

    def _next_token(self, running: RunningRequest) -> SequenceInput:
        assert running.row is not None
        place = len(running.prompt.ids) + len(running.new_ids) - 1
        return SequenceInput(running.row, place, running.new_ids[-1:], adapter=running.request.model)

    def _prompt_chunk(self, reading: PrefillChunk[RunningRequest]) -> SequenceInput:
        running = reading.request
        assert running.row is not None
        start, end = reading.slots
        return SequenceInput(
            running.row,
            start,
            running.prompt.ids[start:end],
            wants_next=end == len(running.prompt.ids),
            is_prompt=True,
            images=[visible_part(image, start, end) for image in overlapping(running.prompt.images, start, end)],
            adapter=running.request.model,
        )

    def _encode_images(self, readings: Sequence[PrefillChunk[RunningRequest]]) -> None:
        """Run the tower, once, over all images that a step begins to read and that are not known."""
        begun = [
            (reading.request.prompt, image)
            for reading in readings
            for image in overlapping(reading.request.prompt.images, *reading.slots)
            if image.embeddings is None
        ]
        unknown = {image.key: image for _, image in begun}
        if not unknown:
            return
        for key, embeddings in zip(unknown, embed_images(self.parts.tower, list(unknown.values())), strict=True):
            unknown[key].embeddings = embeddings
            self.images.keep(key, embeddings)
        for prompt, image in begun:
            prompt.num_cached_images += image is not unknown[image.key]  # another one has brought it
            image.embeddings, image.views = unknown[image.key].embeddings, None

    def _write(self, writing: Sequence[RunningRequest], logits: Tensor) -> Told:
        finite = find_finite_rows(logits)
        told: Told = []
        if not all(finite):
            told += [(running, self._fail(running)) for running, good in zip(writing, finite, strict=True) if not good]
            kept = [row for row, good in enumerate(finite) if good]
            writing, logits = [writing[row] for row in kept], logits[kept]
        return told + self._choose(writing, logits) if writing else told

    def _fail(self, running: RunningRequest) -> ModelError:
        """End a request whose logits say nothing; the others go on."""
        running.ended = True
        self._release(running)
        return not_finite(f"token {len(running.new_ids) + 1} of this answer")

    def _choose(self, writing: Sequence[RunningRequest], logits: Tensor) -> Told:
        samplings = [running.request.sampling for running in writing]
        draws = [running.draws.random() if running.request.sampling.temperature else 0.0 for running in writing]
        tokens = choose_tokens(logits, samplings, draws)
        asked = [row for row, sampling in enumerate(samplings) if sampling.logprobs is not None]
        logprobs: dict[int, TokenLogprob] = {}
        if asked:
            most = max(samplings[row].logprobs or 0 for row in asked)
            found = find_logprobs(logits[asked], [tokens[row] for row in asked], most)
            for row, (mine, best) in zip(asked, found, strict=True):
                logprobs[row] = self._logprob(tokens[row], mine, best[: samplings[row].logprobs])
        told: Told = []
        for row, (running, token) in enumerate(zip(writing, tokens, strict=True)):
            chunk = self._append(running, token, logprobs.get(row))
            if chunk.finish_reason is not None:
                running.ended = True
                self._release(running)
            told.append((running, chunk))
        return told

    def _append(self, running: RunningRequest, token: int, logprob: TokenLogprob | None) -> GenerationChunk:
        """Add a token to an answer, or end the answer with it."""
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
    """Return how long prompt and answer may be together. Raises ModelError for more than the model's positions."""
    positions = parts.language_config.get_text_config().to_dict().get("max_position_embeddings")
    wanted = settings.max_model_len or positions or parts.manifest.model_max_length
    if positions is not None and wanted > positions:
        raise ModelError(f"max_model_len is {wanted}, but the language model has {positions} positions; set it lower.")
    if not longest_row(capacity):
        raise ModelError(f"the KV cache holds {capacity} tokens, which is not one row; give it more memory.")
    return int(min(wanted, longest_row(capacity)))
