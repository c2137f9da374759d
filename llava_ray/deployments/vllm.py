"""The vLLM engine of a replica. vLLM is imported when the engine starts."""

from llava_ray.deployments.model_source import ModelSource
from llava_ray.deployments.settings import ServeSettings
from llava_ray.generate.settings import VllmSettings
from llava_ray.generate.vllm.vllm_engine import VllmEngine

_CPU_KV_BYTES = 2 * 2**30  # vLLM allocates them at once, however much is free


def make_engine(source: ModelSource, settings: ServeSettings) -> VllmEngine:
    """Build an engine, not started, on all GPUs of the replica, or on vLLM's CPU build without any."""
    num_gpus = int(settings.num_gpus)
    dtype = "float32" if settings.dtype == "auto" and not settings.num_gpus else settings.dtype
    bounds = VllmSettings(
        max_running=settings.max_num_seqs,
        max_model_len=settings.max_model_len,
        dtype="bfloat16" if dtype == "auto" else dtype,
        num_gpus=max(1, num_gpus) if settings.num_gpus else 0,
        kv_cache_bytes=settings.engine_kv_cache_bytes or (None if settings.num_gpus else _CPU_KV_BYTES),
        memory_share=settings.engine_memory_share,
        prefill_chunk=settings.engine_prefill_chunk,
        prefix_cache=settings.engine_prefix_cache_share > 0,
        max_images=settings.max_images,
        cache_dir=settings.export_dir,
        max_lora_rank=settings.max_lora_rank if settings.loads_adapters else None,
        max_loaded_adapters=settings.max_loaded_adapters,
        quantization=settings.engine_quantization,
    )
    return VllmEngine(
        source.path,
        name=source.name,
        settings=bounds,
        adapters=dict(source.adapters),
        tool_format=settings.tool_format,
    )
