"""Reading of single tensors on demand, so that only the tensors in use are in memory.

The bytes are read, not mapped: pages of a mapped file count as the process's memory as long as any tensor of that file
is alive, and a model stored in half precision would take one and a half times its size while it is converted to fp32.
"""

import math
import re
from collections.abc import Mapping

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import UInt8
from torch import Tensor

from llava_ray.errors import ModelError
from llava_ray.model.tensors.tensor_files import StoredTensor

BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# The bits of each dtype's infinity without the sign; larger ones are NaN. (For a dtype without infinity: NaN.)
_EXPONENTS = {
    torch.float64: 0x7FF0 << 48,
    torch.float32: 0x7F80_0000,
    torch.float16: 0x7C00,
    torch.bfloat16: 0x7F80,
    torch.float8_e5m2: 0x7C,
    torch.float8_e4m3fn: 0x7F,
}
# Masks that some models store among their weights, which may hold infinity.
_MASKS = re.compile(r"(?:^|[._])(?:attn_mask|attention_mask|causal_mask|mask|masked_bias)$")
_PART = 2**20


class LazyTensor:
    """A stored tensor for transformers' state dicts: indexing reads it, as with safetensors' slices."""

    def __init__(self, stored: StoredTensor) -> None:
        """Store the tensor's location."""
        self.stored = stored

    def __getitem__(self, index: object) -> Tensor:
        """Read the tensor and index it."""
        return read_tensor(self.stored)[index]  # type: ignore[index]

    def get_shape(self) -> list[int]:
        """Return its shape without reading it."""
        return list(self.stored.shape)

    @property
    def shape(self) -> torch.Size:
        """Return its shape without reading it."""
        return torch.Size(self.stored.shape)


def read_tensor(stored: StoredTensor) -> Tensor:
    """Read one tensor into memory of its own.

    Raises ModelError if the file ends before it does, or if it holds NaN or infinity.
    """
    num_bytes = stored.span * stored.element_size
    data = np.fromfile(stored.file, np.uint8, num_bytes, offset=stored.offset)
    if data.nbytes != num_bytes:
        raise ModelError(f"{stored.file} ends inside tensor {stored.name}; it was cut off. Copy it again.")
    return check_finite(_as_tensor(data, stored), stored.name, str(stored.file))


def map_tensor(stored: StoredTensor) -> Tensor:
    """Memory-map a tensor: its bytes are read when accessed, and changes to it are never written.

    Rank 0, which reads the values, checks them for NaN and infinity. Raises ModelError.
    """
    num_bytes = stored.span * stored.element_size
    if not num_bytes:
        return read_tensor(stored)
    try:
        tensor = _as_tensor(np.memmap(stored.file, np.uint8, "c", stored.offset, (num_bytes,)), stored)
    except ValueError as error:
        raise ModelError(f"{stored.file} ends inside tensor {stored.name}; it was cut off. Copy it again.") from error
    if dist.is_initialized() and dist.get_rank():
        return tensor
    return check_finite(tensor, stored.name, str(stored.file))


def check_finite(tensor: Tensor, name: str, file: str) -> Tensor:
    """Check and return a tensor of weights. Raises ModelError for NaN or infinity; only masks may hold infinity."""
    if tensor.dtype not in _EXPONENTS or (tensor.dtype.itemsize > 1 and math.isfinite(tensor.sum().item())):
        return tensor  # a single number that is not finite makes the sum not finite, and a sum is the fastest check
    least = _EXPONENTS[tensor.dtype] + (_MASKS.search(name) is not None)
    integer = BITS[tensor.dtype.itemsize]
    magnitudes = torch.iinfo(integer).max
    parts = tensor.reshape(-1).view(integer).split(_PART)
    if count := sum(int(((part & magnitudes) >= least).sum()) for part in parts):
        raise ModelError(
            f"{file}: tensor {name} holds {count:,} of {tensor.numel():,} numbers that are NaN or infinite, so every "
            "answer would be nonsense: the run that wrote it diverged, or the file is damaged. Take an earlier "
            "checkpoint, or copy the file again."
        )
    return tensor


def _as_tensor(data: UInt8[np.ndarray, " bytes"], stored: StoredTensor) -> Tensor:
    """View bytes as a tensor of its dtype and shape."""
    dtype: torch.dtype = getattr(torch, stored.dtype)
    if not data.nbytes:
        return torch.empty(stored.shape, dtype=dtype)
    return torch.from_numpy(data).view(dtype).as_strided(stored.shape, stored.stride)


def read_tensors(stored: Mapping[str, StoredTensor]) -> dict[str, Tensor]:
    """Read tensors under the names given. Raises ModelError."""
    return {name: read_tensor(tensor) for name, tensor in stored.items()}
