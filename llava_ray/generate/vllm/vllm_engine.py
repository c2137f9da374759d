"""The vLLM engine: ``engine.Engine`` over vLLM's own asynchronous engine, which runs in separate processes.

Prompts are ours, token for token: vLLM gets ids and, where an image is one view, the view as we cut it. Answers are
detokenised here too, so that stop texts and incomplete characters are handled as by the built-in engine.
"""

import asyncio
import functools
import itertools
import os
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llava_ray.errors import ModelError, RecordError
from llava_ray.generate.engine import (
    EngineStats,
    GenerationChunk,
    GenerationRequest,
    ModelCard,
    check_unique_request_id,
)
from llava_ray.generate.model_tools import list_tool_formats, may_be_held, share_grammars
from llava_ray.generate.prompt_reading import decode_images, read_text, read_tokens
from llava_ray.generate.prompts import find_prompt_maker
from llava_ray.generate.readings import PromptReading
from llava_ray.generate.settings import VllmSettings
from llava_ray.generate.vllm.vllm_answer import VllmAnswer
from llava_ray.generate.vllm.vllm_model import VllmModel, prepare_adapter, prepare_model
from llava_ray.generate.vllm.vllm_prompts import VllmPrompt, VllmPrompts
from llava_ray.generate.vllm.vllm_quantization import check_known
from llava_ray.images.views import ImageDecoder
from llava_ray.model.blueprint import Blueprint

_LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # the values that vLLM accepts
_LATER_IN_BATCH = 4  # adapters loaded after the start that one of vLLM's batches may have; each takes GPU memory


@dataclass
class Counts:
    """vLLM's statistics, updated every step; implements its "stat logger"."""

    num_waiting: int = 0
    kv_share: float = 0.0
    image_queries: int = 0
    image_hits: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0

    def record(
        self, scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any = None, engine_idx: int = 0
    ) -> None:
        """Record the statistics of a step."""
        del iteration_stats, engine_idx
        if scheduler_stats is not None:
            self.num_waiting = scheduler_stats.num_waiting_reqs + scheduler_stats.num_skipped_waiting_reqs
            self.kv_share = scheduler_stats.kv_cache_usage
            prefixes = getattr(scheduler_stats, "prefix_cache_stats", None)
            if prefixes is not None:
                self.prefix_queries += prefixes.queries
                self.prefix_hits += prefixes.hits
        if mm_cache_stats is not None:
            self.image_queries += mm_cache_stats.queries
            self.image_hits += mm_cache_stats.hits

    def log_engine_initialized(self) -> None:
        """Do nothing."""

    def log(self) -> None:
        """Do nothing."""

    def record_sleep_state(self, is_awake: int, level: int) -> None:
        """Do nothing."""


@dataclass(frozen=True)
class _RunningEngine:
    """The state between start and stop."""

    llm: Any
    model: VllmModel
    prompts: dict[str | None, VllmPrompts]
    adapters: dict[str, Any]
    """vLLM's LoRARequest of each adapter."""
    numbers: Iterator[int]
    """Numbers of the next adapters."""
    card: ModelCard
    kv_tokens: int


@dataclass
class _RequestStream:
    """A request that is being answered."""

    cancelled: bool = False
    adapter: str | None = None


@dataclass
class Totals:
    """Counters since the start."""

    prompt_tokens: int = 0
    new_tokens: int = 0
    cancelled: int = 0


class VllmEngine:
    """An ``engine.Engine`` over a model folder of any layout that vLLM can serve."""

    def __init__(
        self,
        path: str | Path,
        *,
        name: str = "llava",
        settings: VllmSettings | None = None,
        adapters: Mapping[str, str | Path] | None = None,
        tool_format: str | None = None,
    ) -> None:
        """Initialise without loading; ``adapters`` are folders of LoRA adapters for that model.

        ``tool_format`` names the format of calls; by default it is the one that the chat template shows.
        """
        self.tool_format = tool_format
        self.path = path
        self.name = name
        self.settings = settings or VllmSettings()
        self.adapters = dict(adapters or {})
        self.counts = Counts()
        self.totals = Totals()
        self._loaded: _RunningEngine | None = None
        self._streams: dict[str, _RequestStream] = {}
        self.decoder: ImageDecoder | None = None
        self._preparing = ThreadPoolExecutor(1, thread_name_prefix="prepare-requests")
        self._compiling = ThreadPoolExecutor(4, thread_name_prefix="compile-grammars")

    @property
    def card(self) -> ModelCard:
        """Return the model's capabilities. Raises ModelError before the engine has started."""
        return self._ready().card

    async def start(self) -> None:
        """Export the model if necessary, and load it. Raises ModelError."""
        if self._loaded is not None:
            raise ModelError("the engine has started already; start it once.")
        self._loaded = await asyncio.get_running_loop().run_in_executor(self._preparing, self._load)

    async def generate(self, request: GenerationRequest) -> AsyncIterator[GenerationChunk]:
        """Stream the answer; see ``engine.Engine.generate``. The stream of a cancelled request just ends."""
        loaded = self._ready()
        if request.features is not None:
            raise RecordError("vLLM runs here to generate; it returns no features.", reason="engine", field="model")
        check_unique_request_id(request.request_id, self._streams)
        prompts = find_prompt_maker(loaded.prompts, request.model)
        if request.sampling.prompt_logprobs is not None and uses_lora(loaded.model, self.settings):
            raise RecordError(
                "prompt_logprobs: vLLM cannot compute them where it serves adapters; leave the field out, or use a "
                "service of this model without adapters.",
                reason="sampling",
                field="prompt_logprobs",
            )
        stream, ended = _RequestStream(adapter=request.model), False
        self._streams[request.request_id] = stream
        try:
            if may_be_held(request):  # in a thread of its own, and kept for the preparation: others never wait for it
                await asyncio.get_running_loop().run_in_executor(self._compiling, prompts.make_grammar, request)
            prompt = await self._prepare(prompts, request)
            answer = VllmAnswer(prompt, prompts.model.tokenizer, request)
            async with aclosing(self._outputs(loaded, stream, request, prompt)) as outputs:
                async for output in outputs:
                    chunk = answer.take(output)
                    if getattr(output, "prompt_logprobs", None):
                        read = functools.partial(asyncio.get_running_loop().run_in_executor, self._preparing)
                        chunk = replace(chunk, prompt_logprobs=await read(answer.read_prompt, output))
                    self.totals.new_tokens += len(chunk.token_ids)
                    ended = chunk.finish_reason is not None
                    yield chunk
                    if ended:
                        return
        finally:
            self.totals.cancelled += not ended
            del self._streams[request.request_id]

    async def cancel(self, request_id: str) -> None:
        """Cancel a request between two tokens and free its memory; do nothing if it has already ended."""
        stream = self._streams.get(request_id)
        if stream is not None:
            stream.cancelled = True
            await self._ready().llm.abort(request_id)

    def stats(self) -> EngineStats:
        """Return the engine's statistics, without waiting for the model."""
        loaded, num_requests = self._ready(), len(self._streams)
        num_waiting = min(
            self.counts.num_waiting, num_requests
        )  # vLLM's value is of its last step, and it takes none without requests
        return EngineStats(
            num_running=num_requests - num_waiting,
            num_waiting=num_waiting,
            kv_tokens_used=round(self.counts.kv_share * loaded.kv_tokens) if num_requests else 0,
            kv_tokens_capacity=loaded.kv_tokens,
            prompt_tokens=self.totals.prompt_tokens,
            generation_tokens=self.totals.new_tokens,
            image_cache_hits=self.counts.image_hits,
            image_cache_queries=self.counts.image_queries,
            num_cancelled=self.totals.cancelled,
            prefix_cache_queries=self.counts.prefix_queries,
            prefix_cache_hits=self.counts.prefix_hits,
        )

    def check_health(self) -> None:
        """Check that the engine can still answer. Raises ModelError if its process died."""
        if self._ready().llm.errored:
            raise ModelError("vLLM's engine process died; its log says why. Restart it.")

    async def stop(self) -> None:
        """Cancel all requests and free the model."""
        for request_id in list(self._streams):
            await self.cancel(request_id)
        loaded, self._loaded = self._loaded, None
        if loaded is not None:
            await asyncio.get_running_loop().run_in_executor(None, loaded.llm.shutdown)
            for prompts in loaded.prompts.values():
                prompts.grammars.close()
        self._preparing.shutdown(wait=False)
        self._compiling.shutdown(wait=False)

    async def load_adapter(self, name: str, folder: str | Path) -> None:
        """Load another adapter while requests are answered; see ``engine_abilities.LoadsAdapters``."""
        from vllm.lora.request import LoRARequest
        from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS
        from vllm.plugins import load_general_plugins

        load_general_plugins()  # some bring quantizations
        check_known(self.settings.quantization, QUANTIZATION_METHODS)
        loaded, largest = self._ready(), self.settings.max_lora_rank
        if largest is None:
            raise ModelError("this engine loads adapters at its start only; give max_lora_rank in its settings.")
        if name in loaded.prompts:
            raise ModelError(f"there is an adapter {name!r} already; remove it first.")
        adapter = await asyncio.get_running_loop().run_in_executor(
            None, prepare_adapter, loaded.model.blueprint, name, folder, self.settings.cache_dir
        )
        if adapter.rank > largest:
            raise ModelError(
                f"the adapter in {folder} has rank {adapter.rank}; at most {largest} is served here (max_lora_rank). "
                "Start the service with a larger one, or train the adapter with a smaller lora_r."
            )
        request = LoRARequest(name, next(loaded.numbers), str(adapter.folder))
        try:
            await loaded.llm.add_lora(request)
        except (RuntimeError, ValueError, OSError) as error:
            self.check_health()
            raise ModelError(f"vLLM cannot load the adapter in {folder}: {error}") from error
        loaded.adapters[name] = request
        prompts = loaded.prompts[name] = VllmPrompts(adapter.blueprint, loaded.model, loaded.card.max_model_len)
        prompts.tools.named_format = self.tool_format
        share_grammars(loaded.prompts)

    async def unload_adapter(self, name: str) -> None:
        """Remove an adapter; see ``engine_abilities.LoadsAdapters``."""
        loaded = self._ready()
        if any(stream.adapter == name for stream in self._streams.values()):
            raise ModelError(f"the adapter {name!r} is being used; remove it when its requests have ended.")
        request = loaded.adapters.pop(name, None)
        if request is not None:
            del loaded.prompts[name]
            await loaded.llm.remove_lora(request.lora_int_id)

    async def read_prompt(self, request: GenerationRequest) -> PromptReading:
        """Return the tokens of a request; see ``engine.ReadsPrompts``."""
        prompts = find_prompt_maker(self._ready().prompts, request.model)
        opened = await decode_images(request.images, prompts.view_spec, self.decoder, self._preparing)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._preparing, read_tokens, prompts, request, opened)

    async def read_ids(self, token_ids: Sequence[int], model: str | None, field: str) -> str:
        """Return the text of tokens; see ``engine.ReadsPrompts``."""
        prompts = find_prompt_maker(self._ready().prompts, model)
        return await asyncio.get_running_loop().run_in_executor(self._preparing, read_text, prompts, token_ids, field)

    def use_decoder(self, decoder: ImageDecoder) -> None:
        """Decode the images of all later requests with ``decoder``."""
        self.decoder = decoder

    async def _prepare(self, prompts: VllmPrompts, request: GenerationRequest) -> VllmPrompt:
        """Build a prompt; its images are decoded one by one, so that no request occupies every decoder."""
        prepare = functools.partial(asyncio.get_running_loop().run_in_executor, self._preparing)
        if self.decoder is None or not request.images:
            return await prepare(prompts.make, request)
        short = await prepare(prompts.read, request)
        opened = await decode_images(request.images, prompts.view_spec, self.decoder, self._preparing)
        return await prepare(prompts.finish, request, short, opened)

    def _ready(self) -> _RunningEngine:
        if self._loaded is None:
            raise ModelError("the engine is not running; await its start first.")
        return self._loaded

    async def _outputs(
        self, loaded: _RunningEngine, stream: _RequestStream, request: GenerationRequest, prompt: VllmPrompt
    ) -> AsyncGenerator[Any, None]:
        """Yield vLLM's outputs until the answer ends or is cancelled. Raises RecordError or ModelError."""
        from vllm.exceptions import VLLMClientError
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        if stream.cancelled:
            return
        has_counted_prompt = False
        try:
            adapter = loaded.adapters.get(request.model or "")
            generated = loaded.llm.generate(prompt.inputs, prompt.params, request.request_id, lora_request=adapter)
            async with aclosing(generated) as outputs:
                async for output in outputs:
                    if stream.cancelled:
                        return
                    if not has_counted_prompt:
                        has_counted_prompt, self.totals.prompt_tokens = (
                            True,
                            self.totals.prompt_tokens + len(output.prompt_token_ids),
                        )
                    yield output
        except VLLMClientError as error:
            raise RecordError(f"vLLM rejects the request: {error}", reason="engine") from error
        except (EngineDeadError, EngineGenerateError) as error:
            cause = error.__cause__ or error
            raise ModelError(f"vLLM failed while it answered: {cause!r}. Retry with another replica.") from error

    def _load(self) -> _RunningEngine:
        try:
            from vllm.v1.engine.async_llm import AsyncLLM
        except ImportError as error:
            raise ModelError(
                f"engine=vllm needs vLLM, which cannot be imported ({error}): pip install 'llava_ray[vllm]' in an "
                "environment of its own."
            ) from error
        from vllm.config import StructuredOutputsConfig
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.lora.request import LoRARequest

        model = prepare_model(self.path, self.settings.cache_dir, self.adapters)
        # On a CPU it would bind its threads to whole NUMA nodes, other replicas' cores too.
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        try:
            llm = AsyncLLM.from_engine_args(
                AsyncEngineArgs(
                    **engine_arguments(model, self.settings),
                    # Of its libraries the one that our grammars are checked with.
                    structured_outputs_config=StructuredOutputsConfig(backend="guidance"),
                ),
                stat_loggers=[lambda *_: self.counts],
            )
        except (RuntimeError, ValueError, OSError) as error:
            raise ModelError(f"vLLM cannot load {model.folder}: {error}") from error
        config = llm.vllm_config
        max_model_len: int = config.model_config.max_model_len
        blueprints: dict[str | None, Blueprint] = {adapter.name: adapter.blueprint for adapter in model.adapters}
        blueprints[None] = model.blueprint
        prompts: dict[str | None, VllmPrompts] = {
            name: VllmPrompts(own, model, max_model_len) for name, own in blueprints.items()
        }
        share_grammars(prompts)
        for one in prompts.values():
            one.tools.named_format = self.tool_format
        card = ModelCard(
            name=self.name,
            max_model_len=max_model_len,
            vision=True,
            template=model.blueprint.config.version,
            adapters=tuple(self.adapters),
            holds_constraints=True,
            tool_formats=list_tool_formats(prompts, self.name),
        )
        return _RunningEngine(
            llm,
            model,
            prompts,
            {
                adapter.name: LoRARequest(adapter.name, number, str(adapter.folder))
                for number, adapter in enumerate(model.adapters, start=1)
            },
            itertools.count(len(model.adapters) + 1),
            card,
            config.cache_config.num_gpu_blocks * config.cache_config.block_size,
        )


def uses_lora(model: VllmModel, settings: VllmSettings) -> bool:
    """Return whether the engine is prepared for adapters."""
    return bool(model.adapters) or settings.max_lora_rank is not None


def engine_arguments(model: VllmModel, settings: VllmSettings) -> dict[str, Any]:
    """Return the arguments of vLLM's engine."""
    ranks = [adapter.rank for adapter in model.adapters]
    num_loras = len(ranks) + 1
    num_later = 0
    if settings.max_lora_rank is not None:
        # While one is loaded, the one that makes room for it is still there.
        num_later = settings.max_loaded_adapters + 1
        ranks.append(min(settings.max_lora_rank, _LORA_RANKS[-1]))
    lora = {
        "enable_lora": True,
        # One place more than adapters: on a CPU vLLM 0.32 looks up requests without one at index -1, which is the last
        # place, and has to be empty.
        "max_loras": num_loras + min(num_later, _LATER_IN_BATCH),
        "max_cpu_loras": num_loras + num_later,
        "max_lora_rank": next((rank for rank in _LORA_RANKS if rank >= max(ranks, default=0)), _LORA_RANKS[-1]),
    }
    bounds = {
        "max_model_len": settings.max_model_len,
        "kv_cache_memory_bytes": settings.kv_cache_bytes,
        "tensor_parallel_size": settings.num_gpus or 1,
        "max_num_seqs": settings.max_running,
        "gpu_memory_utilization": settings.memory_share if settings.num_gpus else None,
        "max_num_batched_tokens": settings.prefill_chunk,
        "enable_prefix_caching": None if settings.prefix_cache else False,
        "quantization": settings.quantization,
        "load_format": "bitsandbytes" if settings.quantization == "bitsandbytes" else None,
    }
    return {
        "model": str(model.folder),
        "dtype": settings.dtype,
        "generation_config": "vllm",  # sampling follows the request, not the model's defaults
        "limit_mm_per_prompt": {"image": settings.max_images},
        "max_logprobs": -1,
        "enforce_eager": not settings.num_gpus,
        "disable_log_stats": True,
        **{key: value for key, value in bounds.items() if value is not None},
        **(lora if uses_lora(model, settings) else {}),
    }
