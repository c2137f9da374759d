"""Settings of the engines: memory and batch limits."""

from dataclasses import dataclass
from typing import Literal

BUILTIN_QUANTIZATIONS = ("int8",)
# vLLM's names. The first ones quantise a model as it is loaded, the others are of models that are quantised on disk.
VLLM_QUANTIZATIONS = (
    "bitsandbytes",
    "fp8",
    "fp8_per_tensor",
    "fp8_per_block",
    "fp8_per_channel",
    "int8_per_channel_weight_only",
    "experts_int8",
    "awq",
    "awq_marlin",
    "auto_awq",
    "gptq",
    "gptq_marlin",
    "auto_gptq",
    "compressed-tensors",
    "modelopt",
    "quark",
    "torchao",
)


@dataclass(frozen=True)
class EngineSettings:
    """Limits of the built-in engine; the defaults suit a small model on a few CPU cores as well as a GPU."""

    max_running: int = 64
    """Requests in one batch; others wait."""
    prefill_chunk: int | None = None
    """Prompt tokens of one step, which bounds the pause of a running stream; None for 256 on a CPU, 2,048 on a GPU."""
    kv_cache_tokens: int | None = None
    """Most tokens of prompts and answers in the cache, reserved ones included; None for what fits into
    ``kv_cache_bytes``."""
    kv_cache_bytes: int | None = None
    """Memory of keys and values; None for ``memory_share`` of what the device has free."""
    memory_share: float | None = None
    """Of the device's free memory, once the model is loaded; None for 0.8 of a GPU, 0.25 on a CPU."""
    prefix_cache_share: float = 0.5
    """Most of that memory that keeps known text for later requests; 0 keeps none."""
    speculative_tokens: int = 8
    """Most tokens of a greedy answer that are guessed from its prompt and checked at once; 0 guesses none."""
    image_cache_bytes: int = 256 * 2**20
    """Memory of the embeddings of images already seen."""
    max_model_len: int | None = None
    """Tokens of one prompt and answer together; None for the language model's positions."""
    max_waiting_tokens: int | None = None
    """Tokens of prompts and answers that wait for memory; a request beyond them is refused. None for 32 times what
    the KV cache holds."""
    packed_weight_bytes: int = 4 * 2**30
    """On a CPU, memory for packed copies of the weight matrices; a model that needs more has none."""
    max_lora_rank: int | None = None
    """Largest rank of adapters that are loaded after the start; None for an engine that loads none then."""
    quantization: Literal["int8"] | None = None
    """Of the language model's weights in memory, on a CPU; None for those that were loaded."""


@dataclass(frozen=True)
class VllmSettings:
    """Limits of the vLLM engine; None leaves the decision to vLLM."""

    max_running: int | None = None
    """Requests in one batch; others wait."""
    max_model_len: int | None = None
    """Tokens of one prompt and answer together."""
    dtype: str = "auto"
    """Of the weights; auto is the files' own."""
    num_gpus: int = 0
    """GPUs of tensor parallelism; 0 for the CPU build."""
    kv_cache_bytes: int | None = None
    """Memory of keys and values; None for what is left of a GPU."""
    memory_share: float | None = None
    """Of a GPU's memory, for all that the engine holds; None leaves it to vLLM."""
    prefill_chunk: int | None = None
    """Tokens of one step, of all requests together."""
    prefix_cache: bool = True
    """Whether to keep known text for later requests."""
    max_images: int = 8
    """Images of one request."""
    cache_dir: str = "~/.cache/llava_ray/vllm"
    """Folder for exports of models that are not in the hub layout."""
    max_lora_rank: int | None = None
    """Largest rank of adapters that are loaded after the start; None for an engine that loads none then."""
    max_loaded_adapters: int = 32
    """Adapters in memory that were loaded after the start."""
    quantization: str | None = None
    """vLLM's name of the weights' quantisation; None for what the model's config.json says."""
