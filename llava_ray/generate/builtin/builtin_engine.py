"""The built-in engine: continuous batching over a transformers model, on CPU or GPU.

The caller's event loop only accepts requests and delivers chunks. Requests are prepared in one thread, where their
images are decoded too unless a decoder is set; the model runs in another, step after step, and checks for new and
cancelled requests between two steps.
"""

import asyncio
import functools
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Condition, Thread

import torch

from llava_ray.config.sections import MAX_IMAGE_PIXELS
from llava_ray.errors import BusyError, ModelError
from llava_ray.generate.adapter_loading import AdapterLoader
from llava_ray.generate.builtin.running_batch import RunningBatch, RunningRequest, StepResults
from llava_ray.generate.engine import (
    EngineStats,
    GenerationChunk,
    GenerationRequest,
    ModelCard,
    check_unique_request_id,
)
from llava_ray.generate.model_tools import list_tool_formats, may_be_held, share_grammars
from llava_ray.generate.prompts import Prompt, PromptMaker, find_prompt_maker
from llava_ray.generate.row_adapters import AdapterName
from llava_ray.generate.served_adapters import ServedAdapter, ServedAdapters, load_adapters
from llava_ray.generate.settings import EngineSettings
from llava_ray.generate.vision_cache import VisionCache
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
        self._failure: BaseException | None = None
        self._changed = Condition()
        self._to_add: list[RunningRequest] = []
        self._to_drop: list[RunningRequest] = []
        self._between: list[tuple[Callable[[], None], asyncio.Future[None]]] = []
        """Calls that the thread of the steps makes before its next step."""
        self._stopping = False
        self._thread: Thread | None = None
        self.decoder: ImageDecoder | None = None
        self._preparing = ThreadPoolExecutor(1, thread_name_prefix="prepare-requests")
        self._compiling = ThreadPoolExecutor(4, thread_name_prefix="compile-grammars")
        self._loading = ThreadPoolExecutor(1, thread_name_prefix="load-adapters")

    @property
    def card(self) -> ModelCard:
        """Return the model's capabilities. Raises ModelError before the engine has started."""
        return self._ready().card

    async def start(self) -> None:
        """Load the model and start serving. Raises ModelError."""
        if self._thread is not None:
            raise ModelError("the engine has started already; start it once.")
        self._loop = asyncio.get_running_loop()
        self._loaded = await self._loop.run_in_executor(self._preparing, self._load)
        self._thread = Thread(target=self._serve, args=(self._loaded.batch,), name="model-steps", daemon=True)
        self._thread.start()
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
            grammar = None
            if may_be_held(request):  # others never wait for grammars
                grammar = await self._loop.run_in_executor(self._compiling, prompts.make_grammar, request)
            prompt = await self._prepare(prompts, request)
            prompt.grammar = grammar
            if stream.cancelled:
                return
            self._join(loaded.batch, stream, request, prompt)
            while (item := await stream.queue.get()) is not None:
                if isinstance(item, Exception):
                    raise item
                yield item
                if item.finish_reason is not None:
                    return
        finally:
            del self._streams[request.request_id]
            if stream.running is not None:
                self._leave(stream.running)

    async def cancel(self, request_id: str) -> None:
        """Cancel a request between two tokens and free its memory; do nothing if it has already ended."""
        stream = self._streams.get(request_id)
        if stream is not None:
            stream.cancelled = True
            stream.queue.put_nowait(None)
            if stream.running is not None:
                self._leave(stream.running)

    def stats(self) -> EngineStats:
        """Return the engine's statistics, without waiting for the model."""
        return self._ready().batch.stats(num_joining=len(self._to_add))

    def check_health(self) -> None:
        """Check that the engine can still answer. Raises ModelError if its loop died."""
        self._ready()
        if self._failure is not None:
            raise ModelError(f"the engine's loop died: {self._failure!r}. Restart it.") from self._failure
        if self._thread is None or not self._thread.is_alive():
            raise ModelError("the engine's loop is not running. Restart it.")

    async def stop(self) -> None:
        """Cancel all requests and free the model."""
        for request_id in list(self._streams):
            await self.cancel(request_id)
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread is not None:
            await asyncio.get_running_loop().run_in_executor(None, self._thread.join)
        self._preparing.shutdown(wait=False)
        self._compiling.shutdown(wait=False)
        if self._loaded is not None:
            for prompts in self._loaded.prompts.values():
                prompts.grammars.close()
        self._loading.shutdown(wait=False)
        self._loaded = None

    async def load_adapter(self, name: str, folder: str | Path) -> None:
        """Load another adapter while requests are answered; see ``engine.LoadsAdapters``."""
        loaded = self._ready()
        if loaded.loader is None:
            raise ModelError("this engine loads adapters at its start only; give max_lora_rank in its settings.")
        if name in loaded.prompts:
            raise ModelError(f"there is an adapter {name!r} already; remove it first.")
        found = await self._loop.run_in_executor(self._loading, loaded.loader.load, name, folder)
        await self._between_steps(functools.partial(loaded.batch.adapters.add, name, found.terms))
        loaded.prompts[name] = self._prompt_maker(found, loaded.parts, loaded.batch)
        share_grammars(loaded.prompts)

    async def unload_adapter(self, name: str) -> None:
        """Remove an adapter; see ``engine.LoadsAdapters``."""
        loaded = self._ready()
        if any(stream.adapter == name for stream in self._streams.values()):
            raise ModelError(f"the adapter {name!r} is being used; remove it when its requests have ended.")
        if loaded.prompts.pop(name, None) is not None:
            await self._between_steps(functools.partial(loaded.batch.adapters.discard, name))

    def use_decoder(self, decoder: ImageDecoder) -> None:
        """Decode the images of all later requests with ``decoder``."""
        self.decoder = decoder

    async def _prepare(self, prompts: PromptMaker, request: GenerationRequest) -> Prompt:
        """Build a prompt; its images are decoded one by one, so that no request occupies every decoder."""
        prepare = functools.partial(self._loop.run_in_executor, self._preparing)
        if self.decoder is None or not request.images:
            return await prepare(prompts.make, request)
        begun = await prepare(prompts.begin, request)
        opened = [
            await self.decoder.open_views(
                request.images[index], f"image {index + 1}", max_pixels=MAX_IMAGE_PIXELS, spec=prompts.view_spec
            )
            for index in begun.unknown
        ]
        return await prepare(prompts.finish, request, begun, opened)

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
        )
        return _LoadedModel(parts, makers, batch, card, loader)

    def _prompt_maker(self, adapter: ServedAdapter | None, base: LlavaParts, batch: RunningBatch) -> PromptMaker:
        """Return what makes the prompts of the base or of an adapter."""
        own = f" by {adapter.name}" if adapter is not None and adapter.has_own_features(base) else ""
        maker = PromptMaker(base if adapter is None else adapter.parts, batch.images, batch.max_model_len, own)
        maker.tools.named_format = self.tool_format
        maker.limit_reason = batch.limit_reason
        return maker

    async def _between_steps(self, call: Callable[[], None]) -> None:
        """Let the thread of the steps make a call before its next step. Raises its error, or ModelError."""
        self.check_health()
        done: asyncio.Future[None] = self._loop.create_future()
        with self._changed:
            if self._stopping:
                raise ModelError("the engine is stopping.")
            self._between.append((call, done))
            self._changed.notify()
        await done

    def _join(self, batch: RunningBatch, stream: _AnswerStream, request: GenerationRequest, prompt: Prompt) -> None:
        self.check_health()
        self._check_queue(batch, len(prompt.ids) + request.sampling.max_tokens)
        stream.running = batch.request(request, prompt, stream.queue)
        with self._changed:
            self._to_add.append(stream.running)
            self._changed.notify()

    def _check_queue(self, batch: RunningBatch, num_tokens: int) -> None:
        """Check that the tokens that wait for memory are not too many. Raises BusyError."""
        joining = sum(running.num_tokens for running in list(self._to_add))
        waiting = joining + batch.num_waiting_tokens
        if waiting and waiting + num_tokens > batch.max_waiting_tokens:
            raise BusyError(
                f"{waiting:,} tokens wait for memory, and this request has {num_tokens:,} of prompt and answer; at "
                f"most {batch.max_waiting_tokens:,} may wait (max_waiting_tokens). Try again later, or ask for less."
            )

    def _leave(self, running: RunningRequest) -> None:
        with self._changed:
            if not running.ended:
                running.ended = True
                self._to_drop.append(running)
                self._changed.notify()

    @torch.inference_mode()
    def _serve(self, batch: RunningBatch) -> None:
        """Run steps until the engine stops; runs in its own thread."""
        try:
            while True:
                with self._changed:
                    while not (self._stopping or self._to_add or self._to_drop or self._between or batch.has_work):
                        self._changed.wait()
                    joining, self._to_add = self._to_add, []
                    leaving, self._to_drop = self._to_drop, []
                    between, self._between = self._between, []
                batch.add(joining)
                batch.drop(leaving)
                for call, done in between:
                    self._run_between(call, done)
                if self._stopping:
                    break
                self._deliver_soon(batch.step())
        except BaseException as error:  # noqa: BLE001 - whatever it was, all waiting callers must receive it
            self._failure = error
            self._call(self._fail_all, error)
        finally:
            with self._changed:
                self._stopping = True
                between, self._between = self._between, []
            for _, done in between:
                self._call(_settle, done, ModelError("the engine has stopped."))
            batch.close()
            torch.cuda.empty_cache()

    def _run_between(self, call: Callable[[], None], done: "asyncio.Future[None]") -> None:
        """Make a call between two steps; its error is its caller's alone."""
        failure: Exception | None = None
        try:
            call()
        except Exception as error:  # noqa: BLE001 - the caller raises it
            failure = error
        self._call(_settle, done, failure)

    def _deliver_soon(self, results: StepResults) -> None:
        if results:
            self._call(self._deliver, results)

    def _deliver(self, results: StepResults) -> None:
        for running, result in results:
            running.queue.put_nowait(result)

    def _fail_all(self, error: BaseException) -> None:
        for stream in self._streams.values():
            stream.queue.put_nowait(
                ModelError(f"the engine died while it answered: {error!r}. Retry with another replica.")
            )

    def _call(self, function: Callable[..., None], *arguments: object) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(functools.partial(function, *arguments))


def _settle(done: "asyncio.Future[None]", failure: Exception | None) -> None:
    """Set the result of a call, unless its caller has gone."""
    if done.cancelled():
        return
    if failure is None:
        done.set_result(None)
    else:
        done.set_exception(failure)
