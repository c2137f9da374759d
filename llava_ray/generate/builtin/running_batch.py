"""Continuous batching: requests join and leave between two steps, each step decodes one token of every answer."""

import functools
import random
import time
from asyncio import Queue
from collections.abc import Callable, Sequence
from itertools import groupby

from torch import Tensor

from llava_ray.errors import LlavaRayError, ModelError, RecordError
from llava_ray.generate.builtin.batching import RowModel, SequenceInput
from llava_ray.generate.builtin.constrained_rows import ConstrainedRows
from llava_ray.generate.builtin.drafts import DraftSource, count_accepted, may_draft
from llava_ray.generate.builtin.features import as_vector_chunk
from llava_ray.generate.builtin.kv_cache import KvCache
from llava_ray.generate.builtin.kv_memory import choose_kv_memory, find_device_memory
from llava_ray.generate.builtin.packed_linear import pack_linears
from llava_ray.generate.builtin.prefix_keys import BlockKeys, KeyRoots
from llava_ray.generate.builtin.prefix_reuse import find_readers, forget_prefix, keep_prefix
from llava_ray.generate.builtin.prompt_images import embed_images, find_overlapping, visible_part
from llava_ray.generate.builtin.prompt_scores import PromptScores, bound_scored, score_prompts
from llava_ray.generate.builtin.running_request import RunningRequest
from llava_ray.generate.builtin.scheduling import PrefillChunk, WaitingQueue, split_prefill_chunk
from llava_ray.generate.decoding import decode
from llava_ray.generate.engine import EngineStats, GenerationChunk, GenerationRequest
from llava_ray.generate.logit_edits import LogitEdits, edit_rows, edits_logits
from llava_ray.generate.logprobs import TokenLogprob
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

_WAITING_SHARE = 32  # tokens that wait at most, over those that the cache holds: what comes later waits for minutes

# Tokens of drafts that a step checks: their share of its time stays small. A GPU has computing power to spare.
_CPU_DRAFTS, _GPU_DRAFTS = 32, 256

# The results of a step: the next chunk of an answer, or its error.
StepResults = list[tuple[RunningRequest, GenerationChunk | LlavaRayError]]


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
            self.memory = choose_kv_memory(
                settings,
                token_bytes=self.model.cache_bytes,
                wanted_len=_find_wanted_len(parts, settings),
                device=model.device,
                free=find_device_memory(model.device),
            )
        except BaseException:
            self._restore_model()
            raise
        on_cpu = model.device.type == "cpu"
        self.chunk = settings.prefill_chunk or (_CPU_CHUNK if on_cpu else _GPU_CHUNK)
        self.max_running = settings.max_running
        capacity, self.max_model_len = self.memory.capacity, self.memory.max_model_len
        self.limit_reason = self.memory.limit_reason
        self.kv = KvCache(capacity, int(capacity * settings.prefix_cache_share))
        self.max_waiting_tokens = settings.max_waiting_tokens or _WAITING_SHARE * capacity
        self.roots = KeyRoots()
        self.longest_draft = settings.speculative_tokens
        self.draft_budget = _CPU_DRAFTS if on_cpu else _GPU_DRAFTS
        self.waiting: WaitingQueue[RunningRequest] = WaitingQueue()
        self.running: list[RunningRequest] = []
        self.num_prompt_tokens = self.num_new_tokens = self.num_cancelled = 0
        self.constrained = ConstrainedRows()
        self._undo.append(self.constrained.close)
        self.num_drafted = self.num_accepted = 0

    def request(
        self, request: GenerationRequest, prompt: Prompt, queue: "Queue[GenerationChunk | Exception | None]"
    ) -> RunningRequest:
        """Build the state of a request, for ``add``."""
        sampling = request.sampling
        text = prompt.answer_text(functools.partial(decode, self.parts.tokenizer), request)
        keys = BlockKeys(self.roots.find(request.model), prompt.ids, prompt.images)
        drafts = None
        if self.longest_draft and prompt.grammar is None and request.features is None and may_draft(sampling):
            drafts = DraftSource(self.longest_draft)
        running = RunningRequest(request, prompt, queue, text, random.Random(sampling.seed), keys, drafts)
        if edits_logits(sampling):
            running.edits = LogitEdits(sampling, prompt.ids, self.model.device)
        if sampling.prompt_logprobs is not None:
            running.scores = PromptScores(prompt.ids, sampling.prompt_logprobs)
        return running

    @property
    def num_waiting_tokens(self) -> int:
        """Return the tokens of all requests that wait for memory."""
        return self.waiting.num_tokens

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
        decoding = [running for running in self.running if not running.num_unread and running.held is None]
        chunks = bound_scored(split_prefill_chunk(find_readers(self.kv, self.running), self.chunk))
        self._encode_images(chunks)
        self._make_drafts(decoding)
        inputs = [self._next_token(running) for running in decoding]
        inputs += [self._prompt_chunk(chunk) for chunk in chunks]
        # Without inputs the last request has just been cancelled, or all wait for their grammars.
        wanted, logits = self.model.run(inputs) if inputs else ([], None)
        if logits is not None:
            wanted, logits = score_prompts(chunks, len(decoding), wanted, logits)
        self._count_read(chunks)
        for running in decoding:
            running.num_written += 1
        participants = [*decoding, *(chunk.request for chunk in chunks)]
        results, rows, logits = self._take_features([participants[place] for place in wanted], logits)
        rows, logits = self.constrained.exchange(rows, logits, self.running)
        return results if logits is None or not rows else results + self._write(rows, logits)

    def discard_adapter(self, name: str) -> None:
        """Remove an adapter between two steps; no request of the next steps may have it."""
        self.adapters.discard(name)
        self.roots.renew(name)

    def stats(self, *, num_joining: int = 0) -> EngineStats:
        """Return the statistics of the batch."""
        return EngineStats(
            num_running=len(self.running),
            num_waiting=len(self.waiting) + num_joining,
            kv_tokens_used=self.kv.num_reserved,
            kv_tokens_capacity=self.kv.capacity,
            kv_bytes=self.memory.num_bytes,
            prompt_tokens=self.num_prompt_tokens + self.kv.prefixes.num_hits,
            generation_tokens=self.num_new_tokens,
            image_cache_hits=self.images.num_hits,
            image_cache_queries=self.images.num_queries,
            num_cancelled=self.num_cancelled,
            prefix_cache_queries=self.kv.prefixes.num_queries,
            prefix_cache_hits=self.kv.prefixes.num_hits,
            prefix_cache_tokens=self.kv.prefixes.num_tokens,
            draft_tokens=self.num_drafted,
            accepted_tokens=self.num_accepted,
        )

    def close(self) -> None:
        """Drop all requests and restore the model."""
        self.running, self.waiting = [], WaitingQueue()
        self.kv.clear()
        self._restore_model()

    def _restore_model(self) -> None:
        while self._undo:
            self._undo.pop()()

    def _admit(self) -> None:
        admitted = self.waiting.admit(self.max_running - len(self.running), self._reserve_slot)
        for running in admitted:
            running.queued_s = time.monotonic() - running.joined
            self.constrained.begin(running)
        self.running += admitted

    def _reserve_slot(self, running: RunningRequest) -> bool:
        running.row = self.kv.reserve(running.num_tokens)
        return running.row is not None

    def _release(self, running: RunningRequest) -> None:
        assert running.row is not None
        keep_prefix(self.kv, running)
        self.kv.release(running.row)
        running.row = None
        self.running.remove(running)  # last: another thread reads the statistics, and sees its memory freed by then

    def _next_token(self, running: RunningRequest) -> SequenceInput:
        assert running.row is not None
        ids = [running.new_ids[-1], *running.draft]
        return SequenceInput(
            running.row, running.num_written, ids, len(ids), is_prompt=len(ids) > 1, adapter=running.request.model
        )

    def _make_drafts(self, decoding: Sequence[RunningRequest]) -> None:
        """Guess what the answers continue with, as far as checking it costs little beside the step itself."""
        most = min(self.longest_draft, self.draft_budget // len(decoding)) if decoding else 0
        for running in decoding:
            left = running.request.sampling.max_tokens - len(running.new_ids) - 1
            running.draft = running.drafts.draft(min(most, left)) if running.drafts and min(most, left) > 1 else []

    def _count_read(self, chunks: Sequence[PrefillChunk[RunningRequest]]) -> None:
        """Record which parts of prompts a step has read, and keep them for others."""
        for chunk in chunks:
            running = chunk.request
            running.num_read += chunk.num_tokens
            running.num_written = running.num_read
            self.num_prompt_tokens += chunk.num_tokens
            keep_prefix(self.kv, running)
            if not running.num_unread:
                self.kv.prefixes.count(len(running.prompt.ids), running.num_reused)
                if running.drafts is not None:
                    running.drafts.extend(running.prompt.ids)

    def _prompt_chunk(self, chunk: PrefillChunk[RunningRequest]) -> SequenceInput:
        running = chunk.request
        assert running.row is not None
        start, end = chunk.slots
        return SequenceInput(
            running.row,
            start,
            running.prompt.ids[start:end],
            num_wanted=int(end == len(running.prompt.ids)) if running.scores is None else end - start,
            is_prompt=True,
            images=[visible_part(image, start, end) for image in find_overlapping(running.prompt.images, start, end)],
            adapter=running.request.model,
            wants_states=running.request.features is not None,
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
        """Write the next token of each answer; ``decoding`` has the request of each row, several times with a draft."""
        decoding, logits = self._check_drafts(decoding, logits)
        finite = find_finite_rows(logits)
        finite = [good and not running.is_spoilt for running, good in zip(decoding, finite, strict=True)]
        results: StepResults = []
        if not all(finite):
            bad = dict.fromkeys(running for running, good in zip(decoding, finite, strict=True) if not good)
            results += [
                (running, self._fail(running, not_finite_error(f"token {len(running.new_ids) + 1} of this answer")))
                for running in bad
            ]
            good_rows = [row for row, running in enumerate(decoding) if running not in bad]
            decoding, logits = [decoding[row] for row in good_rows], logits[good_rows]
        decoding, logits, failed = self.constrained.split_failed(decoding, logits)
        results += [(running, self._fail(running, error)) for running, error in failed]
        return results + self._sample(decoding, logits) if decoding else results

    def _take_features(
        self, rows: list[RunningRequest], logits: Tensor | None
    ) -> tuple[StepResults, list[RunningRequest], Tensor | None]:
        """End the requests for features with their vectors; return the rows and logits of the others."""
        if not any(running.request.features for running in rows):
            return [], rows, logits
        assert logits is not None
        results: StepResults = []
        for place, running in enumerate(rows):
            if not running.request.features:
                continue
            try:
                states = self.model.states
                chunk = as_vector_chunk(
                    None if states is None else states[place],
                    len(running.prompt.ids),
                    queued_s=running.queued_s,
                    num_cached_tokens=running.num_reused,
                )
            except ModelError as error:
                results.append((running, self._fail(running, error)))
                continue
            running.ended = True
            self._release(running)
            results.append((running, chunk))
        kept = [place for place, running in enumerate(rows) if not running.request.features]
        return results, [rows[place] for place in kept], logits[kept] if kept else None

    def _check_drafts(
        self, decoding: Sequence[RunningRequest], logits: Tensor
    ) -> tuple[Sequence[RunningRequest], Tensor]:
        """Drop the rows after a wrong guess, before anything else sees them; count the right ones as written."""
        if not any(running.draft for running in decoding):
            return decoding, logits
        chosen: list[int] = logits.argmax(-1).tolist()
        kept: list[int] = []
        first = 0
        for running, rows in groupby(decoding):
            last = first + len(list(rows))
            accepted = count_accepted(running.draft, chosen[first:last])
            if running.draft and running.drafts is not None:
                running.drafts.learn(len(running.draft), accepted)
                self.num_drafted += len(running.draft)
                self.num_accepted += accepted
                running.num_written += accepted
                running.draft = []
            kept += range(first, first + accepted + 1)
            first = last
        return [decoding[row] for row in kept], logits[kept]

    def _fail(self, running: RunningRequest, error: LlavaRayError) -> LlavaRayError:
        """End a request with an error; the others continue."""
        running.ended = True
        forget_prefix(self.kv, running)
        running.num_written = 0  # nothing of it is kept
        self._release(running)
        return error

    def _sample(self, decoding: Sequence[RunningRequest], logits: Tensor) -> StepResults:
        samplings = [running.request.sampling for running in decoding]
        draws = [running.draws.random() if running.request.sampling.temperature else 0.0 for running in decoding]
        with_logprobs = [row for row, sampling in enumerate(samplings) if sampling.logprobs is not None]
        of_model = logits[with_logprobs] if with_logprobs else logits  # a copy, of what the model itself finds likely
        edit_rows([running.edits for running in decoding], logits)
        self.constrained.mask(decoding, logits)
        tokens = sample_tokens(logits, samplings, draws)
        logprobs: dict[int, TokenLogprob] = {}
        if with_logprobs:
            most = max(samplings[row].logprobs or 0 for row in with_logprobs)
            found = compute_logprobs(of_model, [tokens[row] for row in with_logprobs], most)
            for row, (mine, best) in zip(with_logprobs, found, strict=True):
                logprobs[row] = self._logprob(tokens[row], mine, best[: samplings[row].logprobs])
        results: StepResults = []
        for row, (running, token) in enumerate(zip(decoding, tokens, strict=True)):
            if running.ended:  # with a token before, of the same draft
                continue
            try:
                chunk = self._append(running, token, logprobs.get(row))
            except RecordError as error:
                results.append((running, self._fail(running, error)))
                continue
            if chunk.finish_reason is not None:
                running.ended = True
                self._release(running)
            results.append((running, chunk))
        return results

    def _append(self, running: RunningRequest, token: int, logprob: TokenLogprob | None) -> GenerationChunk:
        text, ids, reason = running.append(token)
        self.num_new_tokens += len(ids)
        if reason is None:
            self.constrained.begin(running)
        return GenerationChunk(
            text,
            ids,
            (logprob,) if ids and logprob is not None else (),
            reason,
            len(running.prompt.ids),
            running.prompt.num_cached_images,
            running.queued_s,
            running.num_reused,
        )

    def _logprob(self, token: int, logprob: float, best: Sequence[tuple[int, float]]) -> TokenLogprob:
        decode = self.parts.tokenizer.decode
        top = tuple((other, str(decode([other])), value) for other, value in best)
        return TokenLogprob(token, str(decode([token])), logprob, top)


def _find_wanted_len(parts: LlavaParts, settings: EngineSettings) -> int:
    """Return the most tokens of prompt and answer. Raises ModelError for more than the model's positions."""
    positions = parts.language_config.get_text_config().to_dict().get("max_position_embeddings")
    wanted = settings.max_model_len or positions or parts.manifest.model_max_length
    if positions is not None and wanted > positions:
        raise ModelError(f"max_model_len is {wanted}, but the language model has {positions} positions; set it lower.")
    return int(wanted)
