"""The built-in engine of a replica: device, precision and number of threads."""

import functools
import os

import torch

from llava_ray.deployments.model_source import ModelSource
from llava_ray.deployments.settings import ServeSettings
from llava_ray.generate.builtin.builtin_engine import BuiltinEngine
from llava_ray.generate.builtin.kv_memory import find_default_share
from llava_ray.generate.settings import EngineSettings
from llava_ray.model.assembly import LlavaParts
from llava_ray.model.loading import load_pretrained_model


def make_engine(source: ModelSource, settings: ServeSettings) -> BuiltinEngine:
    """Build the engine of a replica, not started."""
    share = settings.engine_memory_share or find_default_share(on_gpu=_on_gpu(settings)) / settings.sharing_replicas
    bounds = EngineSettings(
        max_running=settings.max_num_seqs,
        prefill_chunk=settings.engine_prefill_chunk,
        kv_cache_tokens=settings.engine_kv_cache_tokens,
        kv_cache_bytes=settings.engine_kv_cache_bytes,
        memory_share=share,
        prefix_cache_share=settings.engine_prefix_cache_share,
        speculative_tokens=settings.engine_speculative_tokens,
        image_cache_bytes=settings.engine_image_cache_bytes,
        max_model_len=settings.max_model_len,
        max_waiting_tokens=settings.engine_max_waiting_tokens,
        packed_weight_bytes=settings.engine_packed_weight_bytes,
        max_lora_rank=settings.max_lora_rank if settings.loads_adapters else None,
        quantization="int8" if settings.engine_quantization else None,
    )
    loading = functools.partial(_load_served_model, source.path, settings)
    return BuiltinEngine(
        loading,
        name=source.name,
        settings=bounds,
        adapters=dict(source.adapters),
        prepare_grammars=True,
        tool_format=settings.tool_format,
    )


def _on_gpu(settings: ServeSettings) -> bool:
    """Return whether the replica's model runs on a GPU."""
    return settings.num_gpus > 0 and torch.cuda.is_available()


def _load_served_model(path: str, settings: ServeSettings) -> LlavaParts:
    """Load any layout of a LLaVA, on the replica's GPU if it has one. Raises ModelError."""
    on_gpu = _on_gpu(settings)
    if not on_gpu:  # Ray limits threads to the logical CPUs; a single replica on a laptop may use all cores
        share = (os.cpu_count() or 1) // (settings.max_replicas * len(settings.model))
        torch.set_num_threads(max(1, int(settings.num_cpus), share))
    dtype = getattr(torch, settings.dtype) if settings.dtype != "auto" else torch.bfloat16 if on_gpu else torch.float32
    return load_pretrained_model(path, dtype=dtype, device="cuda" if on_gpu else "cpu")
