"""Copies of a training state in host memory, which a thread writes to storage while training goes on."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from llava_ray.free_memory import find_free_memory

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

_SPARE = 1.25  # times the copy must be free: training needs some of it in the meantime

Write = Callable[[], None]


class StagedFiles:
    """DeepSpeed's writer of checkpoints, replaced by one that copies what it is given and writes it later."""

    def __init__(self, writer: Any, most_bytes: float) -> None:
        """Stage at most ``most_bytes`` for DeepSpeed's own ``writer``, which writes the rest at once."""
        self.writer = writer
        self.left = most_bytes
        self.waiting: list[Write] = []

    def __getattr__(self, name: str) -> Any:
        """Be the writer itself in everything else."""
        return getattr(self.writer, name)

    def save(self, state_dict: Any, path: str) -> None:
        """Stage a state to be written to ``path``, or write it where memory does not suffice."""
        needed = sum(tensor.nbytes for tensor in find_tensors(state_dict))
        if needed > self.left:
            self.writer.save(state_dict, path)
            return
        self.left -= needed
        staged = copy_tensors(state_dict)
        self.waiting.append(lambda: self.writer.save(staged, path))


@contextmanager
def staging(engine: "DeepSpeedEngine", most_bytes: float) -> Iterator[list[Write]]:
    """Let the engine's saves in the block be staged; yield the list of what then has to be written."""
    writer = engine.checkpoint_engine
    staged = StagedFiles(writer, most_bytes)
    engine.checkpoint_engine = staged
    try:
        yield staged.waiting
    finally:
        engine.checkpoint_engine = writer


def copy_tensors(state: Any, copies: dict[tuple[Any, ...], torch.Tensor] | None = None) -> Any:
    """Return a state with each tensor copied to host memory, once where it is there several times.

    Containers are copied, other objects are not: DeepSpeed makes them for the checkpoint or never changes them.
    """
    copies = {} if copies is None else copies
    if isinstance(state, torch.Tensor):
        key = (state.data_ptr(), state.dtype, tuple(state.shape), state.stride(), state.device, type(state))
        if key not in copies:
            made = state.detach().to("cpu", copy=True).requires_grad_(state.requires_grad)
            copies[key] = torch.nn.Parameter(made, state.requires_grad) if type(state) is torch.nn.Parameter else made
        return copies[key]
    if isinstance(state, dict):
        copied = copy.copy(state)  # a module's state has attributes of its own
        copied.update((key, copy_tensors(value, copies)) for key, value in state.items())
        return copied
    if type(state) in (list, tuple):
        return type(state)(copy_tensors(value, copies) for value in state)
    return state


def find_tensors(state: Any) -> Iterator[torch.Tensor]:
    """Yield every tensor of a state."""
    if isinstance(state, torch.Tensor):
        yield state
    elif isinstance(state, dict):
        for value in state.values():
            yield from find_tensors(value)
    elif isinstance(state, list | tuple):
        for value in state:
            yield from find_tensors(value)


def stageable_bytes(num_ranks: int) -> float:
    """Return how many bytes each of ``num_ranks`` on this node may stage: its share of what is free, less a reserve."""
    return free_memory() / num_ranks / _SPARE


def free_memory() -> float:
    """Return the bytes of memory that this node, or the container, has left; 0 where that is unknown."""
    found = find_free_memory()
    return 0.0 if found is None else float(found.num_bytes)
