"""Tensors out of files, each read when it is asked for, so that no more than what is kept is ever in memory.

The bytes are read, not mapped: pages of a mapped file count as the process's own for as long as any tensor of that
file lives, and a model stored in half precision would take one and a half times its size while it is widened.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from llava_ray.errors import ModelError
from llava_ray.model.tensor_files import StoredTensor


class LazyTensor:
    """A stored tensor as transformers takes it in a state dict: indexing it reads it, as with safetensors' slices."""

    def __init__(self, stored: StoredTensor) -> None:
        """Remember where it lies."""
        self.stored = stored

    def __getitem__(self, index: object) -> Tensor:
        """Read the tensor and index it."""
        return read_tensor(self.stored)[index]  # type: ignore[index]

    def get_shape(self) -> list[int]:
        """Return its shape, unread."""
        return list(self.stored.shape)

    @property
    def shape(self) -> torch.Size:
        """Return its shape, unread."""
        return torch.Size(self.stored.shape)


def read_tensor(stored: StoredTensor) -> Tensor:
    """Read one tensor into memory of its own. Raises ModelError if the file ends before it does."""
    dtype: torch.dtype = getattr(torch, stored.dtype)
    data = np.fromfile(stored.file, np.uint8, stored.span * stored.element_size, offset=stored.offset)
    if data.nbytes != stored.span * stored.element_size:
        raise ModelError(f"{stored.file} ends inside tensor {stored.name}; it was cut off. Copy it again.")
    return torch.from_numpy(data).view(dtype).as_strided(stored.shape, stored.stride)


def map_tensor(stored: StoredTensor) -> Tensor:
    """Return a tensor whose bytes stay in the file until they are looked at; changes to it are never written."""
    dtype: torch.dtype = getattr(torch, stored.dtype)
    num_bytes = stored.span * stored.element_size
    if not num_bytes:
        return torch.empty(stored.shape, dtype=dtype)
    data = np.memmap(stored.file, np.uint8, "c", stored.offset, (num_bytes,))
    return torch.from_numpy(data).view(dtype).as_strided(stored.shape, stored.stride)


def read_tensors(stored: Mapping[str, StoredTensor]) -> dict[str, Tensor]:
    """Read tensors under the names given. Raises ModelError."""
    return {name: read_tensor(tensor) for name, tensor in stored.items()}
