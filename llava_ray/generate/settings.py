"""What an engine may use: memory, and how much it does at once."""

from dataclasses import dataclass


@dataclass(frozen=True)
class EngineSettings:
    """Bounds of the built-in engine; the defaults suit a small model on a few CPU cores as well as a GPU."""

    max_running: int = 64
    """Requests in one batch; others wait."""
    prefill_chunk: int | None = None
    """Tokens of prompts read in one step, which is how long a running stream may pause; None for 256 on a CPU, 2,048
    on a GPU."""
    kv_cache_tokens: int | None = None
    """Tokens of prompts and answers that the cache holds at most, reserved ones included; None for what fits into
    ``kv_cache_bytes``."""
    kv_cache_bytes: int = 2 * 2**30
    """Memory of keys and values."""
    image_cache_bytes: int = 256 * 2**20
    """Memory of the embeddings of images already seen."""
    max_model_len: int | None = None
    """Tokens of one prompt and answer together; None for the language model's positions."""
    packed_weight_bytes: int = 4 * 2**30
    """On a CPU, memory for copies of the matrices that are faster to multiply; a model that needs more does without."""


@dataclass(frozen=True)
class VllmSettings:
    """Bounds of the vLLM engine; what is None here vLLM decides."""

    max_running: int | None = None
    """Requests in one batch; others wait."""
    max_model_len: int | None = None
    """Tokens of one prompt and answer together."""
    dtype: str = "auto"
    """Of the weights; auto is the files' own."""
    num_gpus: int = 0
    """GPUs that the model is spread over; 0 for the CPU build."""
    kv_cache_bytes: int | None = None
    """Memory of keys and values; None for what is left of a GPU."""
    max_images: int = 8
    """Images of one request."""
    cache_dir: str = "~/.cache/llava_ray/vllm"
    """Where models are exported to that are not in the hub layout."""
