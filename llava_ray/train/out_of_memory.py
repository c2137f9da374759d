"""Memory that runs out in a worker: the error says where the loop was and which settings need less."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from llava_ray.config.finetune import FinetuneConfig
from llava_ray.errors import TrainingError

# What torch says on a CPU, where it raises a bare RuntimeError.
_CPU_WORDS = (
    "can't allocate memory",
    "not enough memory",
    "Cannot allocate memory",
    "bad allocation",
    "std::bad_alloc",
)


@contextmanager
def naming_memory(rank: int, config: FinetuneConfig, where: Callable[[], str]) -> Iterator[None]:
    """Raise TrainingError in place of an error for memory that has run out; ``where`` says what the loop did."""
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        if not is_out_of_memory(error):
            raise
        first_line = str(error).partition("\n")[0] or type(error).__name__
        raise TrainingError(
            f"rank {rank} ran out of memory at {where()}: {first_line}; to need less, {suggest_settings(config)}"
        ) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory ran out, on a GPU or in the process."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return not isinstance(error, TrainingError) and any(words in str(error) for words in _CPU_WORDS)


def suggest_settings(config: FinetuneConfig) -> str:
    """Return the settings that save memory and are not yet used, those first that leave the result as it is."""
    train, found = config.train, []
    if not train.gradient_checkpointing:
        found.append("set train.gradient_checkpointing = true")
    if train.row_length > train.model_max_length:
        found.append(f"lower train.tokens_per_micro_batch = {train.row_length}")
    if train.zero_stage < 3 and config.cluster.num_workers > 1 and config.lora.bits == 16:
        found.append(f"raise train.zero_stage = {train.zero_stage}")
    if not train.offload_optimizer and train.zero_stage:
        found.append("set train.offload_optimizer = true (GPUs)")
    if train.row_length == train.model_max_length:
        found.append(f"lower train.model_max_length = {train.model_max_length}, which truncates longer samples")
    if not config.lora.lora_enable:
        found.append("train an adapter (lora.lora_enable = true)")
    elif config.lora.bits == 16:
        found.append("quantise the base (lora.bits = 4)")
    found.append(f"or use more workers (cluster.num_workers = {config.cluster.num_workers}) or larger nodes")
    return ", ".join(found)
