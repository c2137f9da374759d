"""Tensors out of files, each read when it is asked for, so that no more than what is kept is ever in memory.

The bytes are read, not mapped: pages of a mapped file count as the process's own for as long as any tensor of that
file lives, and a model stored in half precision would take one and a half times its size while it is widened.
"""

from collections.abc import Mapping

import numpy as np
import torch
from jaxtyping import UInt8
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
    num_bytes = stored.span * stored.element_size
    data = np.fromfile(stored.file, np.uint8, num_bytes, offset=stored.offset)
    if data.nbytes != num_bytes:
        raise ModelError(f"{stored.file} ends inside tensor {stored.name}; it was cut off. Copy it again.")
    return as_tensor(data, stored)


def map_tensor(stored: StoredTensor) -> Tensor:
    """Return a tensor whose bytes stay in the file until they are looked at; changes to it are never written."""
    num_bytes = stored.span * stored.element_size
    if not num_bytes:
        return read_tensor(stored)
    return as_tensor(np.memmap(stored.file, np.uint8, "c", stored.offset, (num_bytes,)), stored)


def as_tensor(data: UInt8[np.ndarray, " bytes"], stored: StoredTensor) -> Tensor:
    """Give bytes the type and shape of the tensor that they are."""
    dtype: torch.dtype = getattr(torch, stored.dtype)
    if not data.nbytes:
        return torch.empty(stored.shape, dtype=dtype)
    return torch.from_numpy(data).view(dtype).as_strided(stored.shape, stored.stride)


def read_tensors(stored: Mapping[str, StoredTensor]) -> dict[str, Tensor]:
    """Read tensors under the names given. Raises ModelError."""
    return {name: read_tensor(tensor) for name, tensor in stored.items()}
