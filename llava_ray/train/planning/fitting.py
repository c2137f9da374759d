"""Settings under which a run that is too large would fit."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from llava_ray.config.finetune import FinetuneConfig
from llava_ray.config.lora import LoraConfig
from llava_ray.config.model import ModelConfig
from llava_ray.model.summary import summarize_model
from llava_ray.train.planning.memory import ModelSizes, estimate_memory
from llava_ray.train.planning.sizing import measure_sizes, run_settings

_FEWEST_TOKENS = 512
_MOST_WORKERS = 64


def suggest_memory_fixes(config: FinetuneConfig, memory: float) -> list[tuple[str, float]]:
    """Return changes, as flags, that make a run fit into ``memory`` bytes, each with the memory then needed.

    Each is tried alone, and only the smallest sufficient step of each kind is returned; if none suffices alone, they
    are combined one after another until they do.
    """
    changes, needs = list(_changes_to_try(config)), memory_estimator()
    fixes: dict[frozenset[str], tuple[str, float]] = {}
    for change in changes:
        needed = needs(config.replaced(change))
        if needed <= memory:
            fixes.setdefault(frozenset(change), (_describe_change(change), needed))
    if fixes:
        return list(fixes.values())
    combined: dict[str, Any] = {}
    for change in changes:
        combined |= change
        needed = needs(config.replaced(combined))
        if needed <= memory:
            return [(_describe_change(combined), needed)]
    return []


def memory_estimator() -> Callable[[FinetuneConfig], float]:
    """Return a function that computes the bytes that a run needs, and measures each model once.

    Few of the settings that are tried change the model's summary.
    """
    measured: dict[tuple[ModelConfig, LoraConfig], ModelSizes] = {}

    def needs(config: FinetuneConfig) -> float:
        key = config.model, config.lora
        if key not in measured:
            measured[key] = measure_sizes(summarize_model(config))
        return estimate_memory(measured[key], run_settings(config)).total

    return needs


def _changes_to_try(config: FinetuneConfig) -> Iterator[dict[str, Any]]:
    """Yield settings that save memory, first those that do not change the trained result."""
    train = config.train
    if not train.gradient_checkpointing:
        yield {"train.gradient_checkpointing": True}
    if config.cluster.num_workers > 1:
        for stage in range(train.zero_stage + 1, 4):
            yield {"train.zero_stage": stage}
    if not train.offload_optimizer:
        yield {"train.offload_optimizer": True, "train.zero_stage": max(train.zero_stage, 2)}
    workers = config.cluster.num_workers * 2
    while train.zero_stage and workers <= _MOST_WORKERS:
        yield {"cluster.num_workers": workers}
        workers *= 2
    length = train.row_length // 2
    while length >= _FEWEST_TOKENS:
        longest = min(train.model_max_length, length)
        yield {"train.tokens_per_micro_batch": length, "train.model_max_length": longest}
        length //= 2
    yield from _adapter_changes(config)


def _adapter_changes(config: FinetuneConfig) -> Iterator[dict[str, Any]]:
    """Yield an adapter in place of full fine-tuning, then one on a quantised language model."""
    if config.model.tune_mm_mlp_adapter or config.model.freeze_backbone:
        return
    if not config.lora.lora_enable:
        yield {"lora.lora_enable": True}
    if config.lora.bits == 16:
        yield {"lora.lora_enable": True, "lora.bits": 4, "train.zero_stage": min(config.train.zero_stage, 2)}


def _describe_change(change: Mapping[str, Any]) -> str:
    """Format settings as flags."""
    return " ".join(f"--{key} {value}" for key, value in change.items())
