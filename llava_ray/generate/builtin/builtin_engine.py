"""The built-in engine: continuous batching over a transformers model, on CPU or GPU.

The caller's event loop only accepts requests and delivers chunks. Requests are prepared in one thread, where their
images are decoded too unless a decoder is set; the model is loaded and runs in another, step after step, and checks for
new and cancelled requests between two steps. Only that thread computes with several cores: OpenMP lets the cores of a
team sleep between two operations once a process has more threads in teams than cores, which slows a step by a third.
"""

import asyncio
import functools
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from llava_ray.errors import BusyError, ModelError
from llava_ray.generate.adapter_loading import AdapterLoader
from llava_ray.generate.builtin.cores import use_one_core
from llava_ray.generate.builtin.features import as_vector_chunk, pool_image
from llava_ray.generate.builtin.prompt_scores import PromptScores
from llava_ray.generate.builtin.running_batch import RunningBatch
from llava_ray.generate.builtin.running_request import RunningRequest
from llava_ray.generate.builtin.step_thread import StepThread
from llava_ray.generate.engine import (
    EngineStats,
    GenerationChunk,
    GenerationRequest,
    ModelCard,
    check_unique_request_id,
)
from llava_ray.generate.model_tools import list_tool_formats, may_be_held, share_grammars
from llava_ray.generate.prompt_reading import decode_images, read_text, read_tokens
from llava_ray.generate.prompts import Prompt, PromptMaker, find_prompt_maker
from llava_ray.generate.readings import PromptReading
from llava_ray.generate.row_adapters import AdapterName
from llava_ray.generate.served_adapters import ServedAdapter, ServedAdapters, load_adapters
from llava_ray.generate.settings import EngineSettings
from llava_ray.generate.vision_cache import VisionCache, image_key
from llava_ray.images.views import ImageDecoder
from llava_ray.model.assembly import LlavaParts
from llava_ray.model.network.int8_linear import round_to_int8


class _AnswerStream:
    """The chunks that one caller awaits, then the end or an error. Used on the event loop only."""

    def __init__(self) -> None:
        """Initialise an empty stream."""
        self.queue: asyncio.Queue[GenerationChunk | Exception | None] = asyncio.Queue()
        self.running: RunningRequest | None = None
        self.cancelled = False
        self.adapter: AdapterName = None


@dataclass(frozen=True)
class _LoadedModel:
    """The state between start and stop."""

    parts: LlavaParts
    prompts: dict[AdapterName, PromptMaker]
    """Of each adapter; of the base under None."""
    batch: RunningBatch
    card: ModelCard
    loader: AdapterLoader | None
    """Loads adapters after the start, where the settings ask for it."""


class BuiltinEngine:
    """An ``engine.Engine`` over the model that ``load`` returns.

    The engine owns that model between ``start`` and ``stop``: its attention is replaced, so nothing else can use it.
    """

    def __init__(
        self,
        load: Callable[[], LlavaParts],
        *,
        name: str = "llava",
        settings: EngineSettings | None = None,
        adapters: Mapping[str, str | Path] | None = None,
        make_batch: Callable[[LlavaParts, VisionCache, EngineSettings, ServedAdapters], RunningBatch] = RunningBatch,
        prepare_grammars: bool = False,
        tool_format: str | None = None,
    ) -> None:
        """Initialise an engine that calls ``load`` once, in a thread; ``name`` is the model's on its card.

        ``adapters`` are folders of LoRA adapters for that model, by the names that requests use. With
        ``prepare_grammars`` the first constrained request need not wait for the tokenizer's tables. ``tool_format``
        names the format of calls; by default it is the one that the chat template shows.
        """
        self.load = load
        self.make_batch = make_batch
        self.prepare_grammars = prepare_grammars
        self.tool_format = tool_format
        self.name = name
        self.settings = settings or EngineSettings()
        self.adapters = dict(adapters or {})
        self._loaded: _LoadedModel | None = None
        self._streams: dict[str, _AnswerStream] = {}
        self._steps = StepThread(self._fail_all)
        self._pooling = asyncio.Lock()
        """Held by the only image whose features are pooled before the next step."""
        self.decoder: ImageDecoder | None = None
        self._preparing = ThreadPoolExecutor(1, "prepare-requests", initializer=use_one_core)
        self._compiling = ThreadPoolExecutor(4, "compile-grammars", initializer=use_one_core)
        self._loading = ThreadPoolExecutor(1, "load-adapters", initializer=use_one_core)

    @property
    def card(self) -> ModelCard:
        """Return the model's capabilities. Raises ModelError before the engine has started."""
        return self._ready().card

    async def start(self) -> None:
        """Load the model and start serving. Raises ModelError."""
        if self._steps.is_started:
            raise ModelError("the engine has started already; start it once.")
        self._loop = asyncio.get_running_loop()
        self._loaded = await self._steps.start(self._load)
        if self.prepare_grammars:
            self._compiling.submit(self._loaded.prompts[None].grammars.tables)  # an error comes with the first request

    async def generate(self, request: GenerationRequest) -> AsyncIterator[GenerationChunk]:
        """Stream the answer; see ``engine.Engine.generate``. The stream of a cancelled request just ends."""
        loaded = self._ready()
        check_unique_request_id(request.request_id, self._streams)
        prompts = find_prompt_maker(loaded.prompts, request.model)
        stream = self._streams[request.request_id] = _AnswerStream()
        stream.adapter = request.model
        try:
            if request.features is not None and request.features != "language":
                yield await self._pool_image(loaded, prompts, request)
                return
            prompt = await self._prepare(prompts, request)
            if stream.cancelled:
                return
            self._join(loaded.batch, stream, request, prompt)
            async for chunk in self._chunks(stream, loaded.parts):
                yield chunk
        finally:
            del self._streams[request.request_id]
            if stream.running is not None:
                self._steps.drop(stream.running)

    async def cancel(self, request_id: str) -> None:
        """Cancel a request between two tokens and free its memory; do nothing if it has already ended."""
        stream = self._streams.get(request_id)
        if stream is not None:
            stream.cancelled = True
            stream.queue.put_nowait(None)
            if stream.running is not None:
                self._steps.drop(stream.running)

    def stats(self) -> EngineStats:
        """Return the engine's statistics, without waiting for the model."""
        return self._ready().batch.stats(num_joining=len(self._steps.joining()))

    def check_health(self) -> None:
        """Check that the engine can still answer. Raises ModelError if its loop died."""
        self._ready()
        self._steps.check_alive()

    async def stop(self) -> None:
        """Cancel all requests and free the model."""
        for request_id in list(self._streams):
            await self.cancel(request_id)
        await self._steps.stop()
        self._preparing.shutdown(wait=False)
        self._compiling.shutdown(wait=False)
        if self._loaded is not None:
            for prompts in self._loaded.prompts.values():
                prompts.grammars.close()
        self._loading.shutdown(wait=False)
        self._loaded = None

    async def load_adapter(self, name: str, folder: str | Path) -> None:
        """Load another adapter while requests are answered; see ``engine_abilities.LoadsAdapters``."""
        loaded = self._ready()
        if loaded.loader is None:
            raise ModelError("this engine loads adapters at its start only; give max_lora_rank in its settings.")
        if name in loaded.prompts:
            raise ModelError(f"there is an adapter {name!r} already; remove it first.")
        found = await self._loop.run_in_executor(self._loading, loaded.loader.load, name, folder)
        await self._steps.call(functools.partial(loaded.batch.adapters.add, name, found.terms))
        loaded.prompts[name] = self._prompt_maker(found, loaded.parts, loaded.batch)
        share_grammars(loaded.prompts)

    async def unload_adapter(self, name: str) -> None:
        """Remove an adapter; see ``engine_abilities.LoadsAdapters``."""
        loaded = self._ready()
        if any(stream.adapter == name for stream in self._streams.values()):
            raise ModelError(f"the adapter {name!r} is being used; remove it when its requests have ended.")
        if loaded.prompts.pop(name, None) is not None:
            await self._steps.call(functools.partial(loaded.batch.discard_adapter, name))

    async def read_prompt(self, request: GenerationRequest) -> PromptReading:
        """Return the tokens of a request; see ``engine.ReadsPrompts``."""
        prompts = find_prompt_maker(self._ready().prompts, request.model)
        opened = await decode_images(request.images, prompts.view_spec, self.decoder, self._preparing)
        return await self._loop.run_in_executor(self._preparing, read_tokens, prompts, request, opened)

    async def read_ids(self, token_ids: Sequence[int], model: str | None, field: str) -> str:
        """Return the text of tokens; see ``engine.ReadsPrompts``."""
        prompts = find_prompt_maker(self._ready().prompts, model)
        return await self._loop.run_in_executor(self._preparing, read_text, prompts, token_ids, field)

    async def _pool_image(
        self, loaded: _LoadedModel, prompts: PromptMaker, request: GenerationRequest
    ) -> GenerationChunk:
        """Return the features of a request's only image, one image at a time, between two steps."""
        of_tower = request.features == "tower"
        key = f"{image_key(request.images[0])}{prompts.projector}"
        known = prompts.cache.find(key)
        if known is not None and not of_tower:
            return as_vector_chunk(known.float().mean(0), len(known))
        [opened] = await decode_images(request.images, prompts.view_spec, self.decoder, self._preparing)
        image = await self._loop.run_in_executor(self._preparing, prompts.prepare, key, opened)
        found: list[GenerationChunk] = []

        def pool() -> None:
            found.append(as_vector_chunk(pool_image(image, of_tower, loaded.batch.images), image.num_tokens))

        async with self._pooling:
            await self._steps.call(pool)
        return found[0]

    def use_decoder(self, decoder: ImageDecoder) -> None:
        """Decode the images of all later requests with ``decoder``."""
        self.decoder = decoder

    async def _chunks(self, stream: _AnswerStream, parts: LlavaParts) -> AsyncIterator[GenerationChunk]:
        """Yield the chunks of an answer, the first with the scores of its prompt where they are asked for."""
        scores = stream.running.scores if stream.running is not None else None
        while (item := await stream.queue.get()) is not None:
            if isinstance(item, Exception):
                raise item
            if scores is not None:
                item, scores = await self._with_scores(item, scores, parts), None
            yield item
            if item.finish_reason is not None:
                return

    async def _prepare(self, prompts: PromptMaker, request: GenerationRequest) -> Prompt:
        """Build a prompt, with the grammar of its answer if it has one; others never wait for grammars."""
        if not may_be_held(request):
            return await self._make_prompt(prompts, request)
        grammar = await self._loop.run_in_executor(self._compiling, prompts.make_grammar, request)
        prompt = await self._make_prompt(prompts, request)
        prompt.grammar = grammar
        return prompt

    async def _make_prompt(self, prompts: PromptMaker, request: GenerationRequest) -> Prompt:
        """Build a prompt; only images that are not cached are decoded."""
        prepare = functools.partial(self._loop.run_in_executor, self._preparing)
        if self.decoder is None or not request.images:
            return await prepare(prompts.make, request)
        begun = await prepare(prompts.begin, request)
        opened = await decode_images(
            request.images, prompts.view_spec, self.decoder, self._preparing, only=begun.unknown
        )
        return await prepare(prompts.finish, request, begun, opened)

    async def _with_scores(self, chunk: GenerationChunk, scores: PromptScores, parts: LlavaParts) -> GenerationChunk:
        """Add the scores of a prompt to its answer's first chunk; decoding their tokens takes time."""
        read = functools.partial(scores.read, parts.tokenizer.decode)
        return replace(chunk, prompt_logprobs=await self._loop.run_in_executor(self._preparing, read))

    def _ready(self) -> _LoadedModel:
        if self._loaded is None:
            raise ModelError("the engine is not running; await its start first.")
        return self._loaded

    def _load(self) -> _LoadedModel:
        parts = self.load()
        if self.settings.quantization is not None:
            round_to_int8(parts.llava.language_model)
        cache = VisionCache(self.settings.image_cache_bytes)
        max_rank = self.settings.max_lora_rank
        served = load_adapters(parts, self.adapters, extract_own=max_rank is not None)
        loader = None if max_rank is None else AdapterLoader(parts, max_rank)
        batch = self.make_batch(parts, cache, self.settings, served)
        makers: dict[AdapterName, PromptMaker] = {None: self._prompt_maker(None, parts, batch)}
        makers |= {adapter.name: self._prompt_maker(adapter, parts, batch) for adapter in served.adapters}
        share_grammars(makers)
        card = ModelCard(
            name=self.name,
            max_model_len=batch.max_model_len,
            vision=True,
            template=parts.config.version,
            adapters=served.names,
            holds_constraints=True,
            tool_formats=list_tool_formats(makers, self.name),
            has_features=True,
        )
        return _LoadedModel(parts, makers, batch, card, loader)

    def _prompt_maker(self, adapter: ServedAdapter | None, base: LlavaParts, batch: RunningBatch) -> PromptMaker:
        """Return what makes the prompts of the base or of an adapter."""
        own = f" by {adapter.name}" if adapter is not None and adapter.has_own_features(base) else ""
        maker = PromptMaker(base if adapter is None else adapter.parts, batch.images, batch.max_model_len, own)
        maker.tools.named_format = self.tool_format
        maker.limit_reason = batch.limit_reason
        return maker

    def _join(self, batch: RunningBatch, stream: _AnswerStream, request: GenerationRequest, prompt: Prompt) -> None:
        self.check_health()
        self._check_queue(batch, len(prompt.ids) + request.sampling.max_tokens)
        stream.running = batch.request(request, prompt, stream.queue)
        self._steps.add(stream.running)

    def _check_queue(self, batch: RunningBatch, num_tokens: int) -> None:
        """Check that the tokens that wait for memory are not too many. Raises BusyError."""
        joining = sum(running.num_tokens for running in self._steps.joining())
        waiting = joining + batch.num_waiting_tokens
        if waiting and waiting + num_tokens > batch.max_waiting_tokens:
            raise BusyError(
                f"{waiting:,} tokens wait for memory, and this request has {num_tokens:,} of prompt and answer; at "
                f"most {batch.max_waiting_tokens:,} may wait (max_waiting_tokens). Try again later, or ask for less."
            )

    def _fail_all(self, error: BaseException) -> None:
        for stream in self._streams.values():
            stream.queue.put_nowait(
                ModelError(f"the engine died while it answered: {error!r}. Retry with another replica.")
            )
