"""How much memory the KV cache gets, and what fits into it."""

import logging
from dataclasses import dataclass

import torch

from llava_ray.errors import ModelError
from llava_ray.free_memory import FreeMemory, find_free_memory
from llava_ray.generate.builtin.kv_cache import longest_slot
from llava_ray.generate.settings import EngineSettings

_log = logging.getLogger(__name__)

_CPU_SHARE, _GPU_SHARE = 0.25, 0.8  # of what is free once the model is loaded; a GPU has nothing else to do
_UNKNOWN_BYTES = 2 * 2**30  # where nobody says what is free
_GIB = 2**30


@dataclass(frozen=True)
class KvMemory:
    """The tokens of the KV cache, and the words for where they come from."""

    capacity: int
    num_bytes: int
    max_model_len: int
    """Tokens of the longest request."""
    reason: str
    """What bounds it."""
    limit_reason: str
    """What bounds the longest request, for those that are refused; empty where it is the model."""


def find_device_memory(device: torch.device) -> FreeMemory | None:
    """Return what a device has free; None where that is unknown."""
    if device.type != "cuda":
        return find_free_memory()
    torch.cuda.empty_cache()  # what loading has left over is free too
    free, _ = torch.cuda.mem_get_info(device)
    return FreeMemory(free, f"of {torch.cuda.get_device_name(device)}")


def find_default_share(*, on_gpu: bool) -> float:
    """Return the share of a device's free memory that one engine takes by default."""
    return _GPU_SHARE if on_gpu else _CPU_SHARE


def choose_kv_memory(
    settings: EngineSettings, *, token_bytes: int, wanted_len: int, device: torch.device, free: FreeMemory | None
) -> KvMemory:
    """Return the size of the KV cache: as set, or a share of what is ``free``; log it.

    ``token_bytes`` are those of one token's keys and values, ``wanted_len`` the tokens of the longest request. Raises
    ModelError if nothing fits, or less than a ``max_model_len`` that was set.
    """
    num_bytes, reason = _choose_bytes(settings, token_bytes, wanted_len, device, free)
    capacity = settings.kv_cache_tokens or num_bytes // max(1, token_bytes)
    num_bytes = capacity * token_bytes
    if settings.kv_cache_tokens:
        reason = f"kv_cache_tokens is {settings.kv_cache_tokens:,}"
    longest = longest_slot(capacity)
    holds = f"the KV cache holds {capacity:,} tokens of {token_bytes:,} bytes ({reason})"
    if not longest:
        raise ModelError(f"{holds}, less than one slot; give it more memory: kv_cache_bytes or memory_share.")
    if longest < wanted_len and settings.max_model_len:
        raise ModelError(
            f"{holds}, and its longest slot {longest:,}, but max_model_len is {wanted_len:,}, which needs "
            f"{wanted_len * token_bytes / _GIB:.2f} GiB; set it lower, or give the cache more memory: kv_cache_bytes "
            "or memory_share."
        )
    most = min(wanted_len, longest)
    limit = f" (its KV cache has {capacity:,} tokens, the model {wanted_len:,})" if longest < wanted_len else ""
    _log.info(
        "KV cache: %.2f GiB for %s tokens (%s); one request of %s tokens takes %.1f %% of it",
        num_bytes / _GIB,
        f"{capacity:,}",
        reason,
        f"{most:,}",
        100 * most / capacity,
    )
    if longest < wanted_len:
        _log.warning(
            "KV cache: one request of the model's %s tokens would need %.2f GiB; requests of more than %s tokens are "
            "refused. Give it more memory: kv_cache_bytes or memory_share",
            f"{wanted_len:,}",
            wanted_len * token_bytes / _GIB,
            f"{longest:,}",
        )
    return KvMemory(capacity, num_bytes, most, reason, limit)


def _choose_bytes(
    settings: EngineSettings, token_bytes: int, wanted_len: int, device: torch.device, free: FreeMemory | None
) -> tuple[int, str]:
    """Return the bytes of the KV cache and the words for where they come from."""
    if settings.kv_cache_bytes is not None:
        return settings.kv_cache_bytes, f"kv_cache_bytes is {settings.kv_cache_bytes:,}"
    if free is None:
        return _UNKNOWN_BYTES, "nothing says what is free here"
    share = settings.memory_share or find_default_share(on_gpu=device.type == "cuda")
    found = f"{100 * share:.3g} % of the {free.num_bytes / _GIB:.2f} GiB free {free.source}"
    # More than all requests at their longest, and as much known text as is kept beside them, is of no use.
    useful = settings.max_running * wanted_len * token_bytes / (1 - min(0.9, settings.prefix_cache_share))
    if useful < share * free.num_bytes:
        return int(useful), f"all that {settings.max_running} requests can use, less than {found}"
    return int(share * free.num_bytes), found
