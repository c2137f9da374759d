"""Reading and writing of weight files one tensor at a time: with memory for one tensor, never for a model.

A safetensors file is eight bytes with the length of its header, the header (JSON: name → dtype, shape, offsets) and the
tensors' bytes (https://github.com/huggingface/safetensors#format). The library needs all tensors of a file at once;
writing the format directly needs only one at a time.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llava_ray.errors import ModelError
from llava_ray.model.tensors.tensor_files import StoredTensor, read_tensor_file, read_weights
from llava_ray.model.tensors.tensor_reading import read_tensor

_MAX_SHARD_BYTES = 5 * 10**9
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

# Names of dtypes in a safetensors header.
DTYPE_NAMES: dict[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}


@dataclass(frozen=True)
class Stored:
    """A tensor that is not in memory: each call of ``load`` reads it; ``file`` is for messages."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], Tensor]
    file: str

    @property
    def num_bytes(self) -> int:
        """Return its size in bytes."""
        return prod(self.shape) * self.dtype.itemsize

    def mapped(self, change: Callable[[Tensor], Tensor], shape: tuple[int, ...] | None = None) -> "Stored":
        """Return a tensor that applies ``change`` to this one when it is read; of the same dtype."""
        return replace(self, load=lambda: change(self.load()), shape=self.shape if shape is None else shape)


def wrap_tensor(tensor: Tensor, source: str = "memory") -> Stored:
    """Wrap a tensor in memory as a Stored."""
    return Stored(tuple(tensor.shape), tensor.dtype, lambda: tensor, source)


def read_folder(folder: Path) -> dict[str, Stored]:
    """Return the tensors of a folder's weight files. Raises ModelError that names what is missing or damaged."""
    weights = read_weights(folder)
    if weights.missing:
        raise ModelError(f"{folder}: {weights.missing[0]}")
    return to_stored(weights.tensors)


def read_weight_file(file: Path) -> dict[str, Stored]:
    """Return the tensors of one .safetensors or .bin file. Raises ModelError for a damaged file."""
    return to_stored(read_tensor_file(file))


def to_stored(tensors: Mapping[str, StoredTensor]) -> dict[str, Stored]:
    """Convert tensors in files to Stored ones, under the same names."""
    return {
        name: Stored(tensor.shape, getattr(torch, tensor.dtype), partial(read_tensor, tensor), str(tensor.file))
        for name, tensor in tensors.items()
    }


def write_folder(
    folder: Path,
    tensors: Mapping[str, Stored],
    *,
    max_shard_bytes: int = _MAX_SHARD_BYTES,
    metadata: Mapping[str, str] | None = None,
) -> list[Path]:
    """Write tensors as safetensors files under transformers' names, with an index if there are several."""
    shards = _split(tensors, max_shard_bytes)
    names = [
        SINGLE_FILE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        for number in range(1, len(shards) + 1)
    ]
    for name, shard in zip(names, shards, strict=True):
        write_weight_file(folder / name, shard, metadata)
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(tensor.num_bytes for tensor in tensors.values())},
            "weight_map": {key: name for name, shard in zip(names, shards, strict=True) for key in shard},
        }
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")
    return [folder / name for name in names]


def write_weight_file(file: Path, tensors: Mapping[str, Stored], metadata: Mapping[str, str] | None = None) -> None:
    """Write one safetensors file, a tensor at a time. Raises ModelError if one differs from the header written."""
    # The widest dtype first, like the library, so that every tensor is aligned.
    ordered = dict(sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])))
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    end = 0
    for name, tensor in ordered.items():
        begin, end = end, end + tensor.num_bytes
        header[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format aligns the tensors' bytes to 8
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in ordered.items():
            stream.write(_bytes_of(name, tensor))


def _bytes_of(name: str, tensor: Stored) -> memoryview:
    # Checked because the header is already on disk: a tensor that changed since would shift all that follow.
    loaded = tensor.load()
    if (tuple(loaded.shape), loaded.dtype) != (tensor.shape, tensor.dtype):
        raise ModelError(
            f"{tensor.file}: {name} is {tuple(loaded.shape)} of {loaded.dtype}, expected {tensor.shape} of "
            f"{tensor.dtype}; the file changed while it was read. Start again."
        )
    flat: memoryview = loaded.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data
    return flat


def _split(tensors: Mapping[str, Stored], max_shard_bytes: int) -> list[dict[str, Stored]]:
    shards: list[dict[str, Stored]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.num_bytes > max_shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.num_bytes
    return shards
