"""Tensors in files, read and written one at a time: memory for one tensor, never for a model.

A safetensors file is eight bytes with the length of its header, the header (JSON: name → dtype, shape, place) and the
tensors' bytes (https://github.com/huggingface/safetensors#format). Writing it by hand lets tensors of any number and
size pass through; the library wants all of a file's tensors at once.
"""

import json
import pickle
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llava_ray.errors import ModelError

MAX_SHARD_BYTES = 5 * 10**9
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
BIN_INDEX_FILE = "pytorch_model.bin.index.json"

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
}
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


@dataclass(frozen=True)
class Stored:
    """A tensor that is not in memory: ``load`` reads it, as often as asked; ``file`` is for messages."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], Tensor]
    file: str

    @property
    def num_bytes(self) -> int:
        """Return its size."""
        return prod(self.shape) * self.dtype.itemsize

    def mapped(self, change: Callable[[Tensor], Tensor], shape: tuple[int, ...] | None = None) -> "Stored":
        """Return the tensor that ``change`` makes of this one, when it is read; of the same dtype."""
        return replace(self, load=lambda: change(self.load()), shape=self.shape if shape is None else shape)


def held(tensor: Tensor, source: str = "memory") -> Stored:
    """Return a tensor in memory as one that could be in a file."""
    return Stored(tuple(tensor.shape), tensor.dtype, lambda: tensor, source)


def read_folder(folder: Path) -> dict[str, Stored]:
    """Return the tensors of a folder's weight files: safetensors or, where there are none, ``pytorch_model*.bin``.

    An index is obeyed. Raises ModelError that names the file that is missing or damaged, and the tensor.
    """
    for index, single in ((INDEX_FILE, SINGLE_FILE), (BIN_INDEX_FILE, "pytorch_model.bin")):
        if (folder / index).is_file():
            return _read_indexed(folder, index)
        if (folder / single).is_file():
            return read_file(folder / single)
    raise ModelError(
        f"{folder} holds no weights; expected {SINGLE_FILE}, {INDEX_FILE} with its shards, or pytorch_model*.bin. "
        "Point at the folder that does."
    )


def read_file(file: Path) -> dict[str, Stored]:
    """Return the tensors of one .safetensors file, or of one .bin file. Raises ModelError for a damaged file."""
    return _read_safetensors(file) if file.suffix == ".safetensors" else _read_pickle(file)


def write_folder(
    folder: Path,
    tensors: Mapping[str, Stored],
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    metadata: Mapping[str, str] | None = None,
) -> list[Path]:
    """Write tensors as safetensors files as transformers names them, with an index if they are several."""
    shards = _split(tensors, max_shard_bytes)
    names = [
        SINGLE_FILE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        for number in range(1, len(shards) + 1)
    ]
    for name, shard in zip(names, shards, strict=True):
        write_file(folder / name, shard, metadata)
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(tensor.num_bytes for tensor in tensors.values())},
            "weight_map": {key: name for name, shard in zip(names, shards, strict=True) for key in shard},
        }
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")
    return [folder / name for name in names]


def write_file(file: Path, tensors: Mapping[str, Stored], metadata: Mapping[str, str] | None = None) -> None:
    """Write one safetensors file, a tensor at a time. Raises ModelError if one is not what its header said."""
    # The widest dtype first, as the library orders them: then every tensor is aligned.
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
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in ordered.items():
            stream.write(_bytes_of(name, tensor))


def _bytes_of(name: str, stored: Stored) -> memoryview:
    tensor = stored.load()
    if (tuple(tensor.shape), tensor.dtype) != (stored.shape, stored.dtype):
        raise ModelError(
            f"{stored.file}: {name} is {tuple(tensor.shape)} of {tensor.dtype}, expected {stored.shape} of "
            f"{stored.dtype}; the file changed while it was read. Start again."
        )
    flat: memoryview = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data
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


def _read_indexed(folder: Path, index: str) -> dict[str, Stored]:
    try:
        places: dict[str, str] = json.loads((folder / index).read_text())["weight_map"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{folder / index} is not an index of weight files ({error}); copy it again.") from error
    tensors: dict[str, Stored] = {}
    for name in sorted(set(places.values())):
        if not (folder / name).is_file():
            lost = [key for key, place in places.items() if place == name]
            raise ModelError(
                f"{folder / name} is missing: {index} says that it holds {len(lost)} tensors, the first is {lost[0]}. "
                "Copy the shard into the folder."
            )
        tensors |= read_file(folder / name)
    absent = sorted(places.keys() - tensors.keys())
    if absent:
        raise ModelError(
            f"{folder / places[absent[0]]} lacks {absent[0]} ({len(absent)} tensors that {index} names); copy it again."
        )
    return {name: tensors[name] for name in places}


def _read_safetensors(file: Path) -> dict[str, Stored]:
    try:
        with safe_open(file, "pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 - no mapping
            kinds = {name: (tuple(part.get_shape()), DTYPES[part.get_dtype()]) for name, part in slices.items()}
    except (OSError, SafetensorError, KeyError) as error:
        raise ModelError(
            f"{file} cannot be read as safetensors ({error}): it is truncated or damaged. Copy it again."
        ) from error
    return {
        name: Stored(shape, dtype, partial(_load_safetensors, file, name), str(file))
        for name, (shape, dtype) in kinds.items()
    }


def _load_safetensors(file: Path, name: str) -> Tensor:
    # Opened anew each time: a mapping that stays open keeps what was read of it in memory.
    try:
        with safe_open(file, "pt") as opened:
            tensor: Tensor = opened.get_tensor(name)
    except (OSError, SafetensorError) as error:
        raise ModelError(
            f"{file}: {name} cannot be read any more ({error}); the file changed. Copy it again."
        ) from error
    return tensor


def _read_pickle(file: Path) -> dict[str, Stored]:
    tensors = _unpickle(file)
    return {name: Stored(tuple(t.shape), t.dtype, partial(_load_pickled, file, name), str(file)) for name, t in tensors}


def _load_pickled(file: Path, name: str) -> Tensor:
    return dict(_unpickle(file))[name]


def _unpickle(file: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield a torch pickle's tensors; nothing in it is run, and what the format allows stays on the disk."""
    try:
        try:
            loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # written before torch 1.6: such a file cannot be mapped
            loaded = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ModelError(
            f"{file} holds more than tensors, or is damaged ({str(error).splitlines()[0]}); it was not run. Get the "
            "weights as safetensors."
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError) as error:
        raise ModelError(f"{file} cannot be read as torch weights ({error}); copy it again.") from error
    if not isinstance(loaded, Mapping) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise ModelError(f"{file} holds no tensors by name; expected a state dict. Point at the folder of a model.")
    yield from loaded.items()
