"""What files of weights hold, from their headers alone: names, shapes and where the bytes are. No torch."""

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from llava_ray.errors import ModelError
from llava_ray.model.pickled_tensors import read_pickle

# Kept by older versions of transformers, and computed by newer ones.
COMPUTED = re.compile(r"(rotary_emb\.inv_freq|embeddings\.position_ids)$")
MAX_HEADER_BYTES = 100 * 2**20  # the limit of the safetensors library

NO_WEIGHTS = (
    "it holds no weights; expected model.safetensors or pytorch_model.bin, or shards of one with their index file."
)

# Names of dtypes as torch spells them, and bytes of one element.
DTYPES = {
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "I16": ("int16", 2),
    "I8": ("int8", 1),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
}


@dataclass(frozen=True)
class StoredTensor:
    """One tensor in a file: ``offset`` is its first byte, ``stride`` is in elements."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    element_size: int

    @property
    def numel(self) -> int:
        """Count its elements."""
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Count the bytes of its elements."""
        return self.numel * self.element_size

    @property
    def span(self) -> int:
        """Count the elements from its first to its last in the file."""
        steps = zip(self.shape, self.stride, strict=True)
        return 1 + sum((size - 1) * step for size, step in steps) if self.numel else 0


def read_tensor_file(file: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a .safetensors or .bin file by name.

    Raises ModelError that names the file if it is missing, cut off, damaged, or holds more than tensors.
    """
    try:
        if file.suffix == ".safetensors":
            return _read_safetensors(file)
        return {name: StoredTensor(file, name, *tensor) for name, tensor in read_pickle(file).items()}
    except OSError as error:
        raise ModelError(
            f"{file} cannot be read ({error.strerror}); copy it again, or mend its permissions."
        ) from error


@dataclass(frozen=True)
class Weights:
    """The weight files of a folder. ``names`` are all tensors that it should hold, ``missing`` says what it lacks."""

    tensors: dict[str, StoredTensor]
    names: frozenset[str]
    missing: tuple[str, ...] = ()

    @classmethod
    def of(cls, tensors: dict[str, StoredTensor]) -> Self:
        """Take the tensors of a file for all that there should be."""
        return cls(tensors, frozenset(tensors))

    def renamed(self, rename: Callable[[str], str]) -> Self:
        """Return the weights by other names, without what newer versions of transformers compute."""
        tensors: dict[str, StoredTensor] = {}
        for name, tensor in self.tensors.items():
            if COMPUTED.search(name):
                continue
            if (other := tensors.get(rename(name))) is not None:
                raise ModelError(f"{tensor.file}: {name} is the same tensor as {other.name} in {other.file.name}.")
            tensors[rename(name)] = tensor
        names = frozenset(rename(name) for name in self.names if not COMPUTED.search(name))
        return replace(self, tensors=tensors, names=names)

    def below(self, part: str) -> Self:
        """Return the weights as those of a part."""
        return self.renamed(lambda own: f"{part}.{own}")


def read_weights(folder: Path) -> Weights:
    """Read the headers of a folder's weight files, in transformers' order of preference; there may be none.

    Raises ModelError for a file that is damaged; one that is not there is only said to be missing.
    """
    for stem, ending in (("model", "safetensors"), ("pytorch_model", "bin")):
        single, index = folder / f"{stem}.{ending}", folder / f"{stem}.{ending}.index.json"
        if single.is_file():
            return Weights.of(read_tensor_file(single))
        if index.is_file():
            return _read_shards(index)
    return Weights({}, frozenset(), (NO_WEIGHTS,))


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object. Raises ModelError that names it."""
    try:
        values = json.loads(file.read_bytes())
    except OSError as error:
        raise ModelError(f"{file} cannot be read ({error.strerror}).") from error
    except ValueError as error:
        raise ModelError(f"{file} is not JSON ({error}): it was cut off or edited. Copy it again.") from error
    if not isinstance(values, dict):
        raise ModelError(f"{file} holds a {type(values).__name__}; expected a JSON object. Copy it again.")
    return values


def _read_shards(index: Path) -> Weights:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{index} has no weight_map that says which shard holds which tensor; copy it again.")
    tensors: dict[str, StoredTensor] = {}
    missing = []
    for shard in sorted(set(weight_map.values())):
        expected = [name for name, file in weight_map.items() if file == shard]
        if not index.with_name(shard).is_file():
            missing.append(
                f"shard {shard} is not there, which {index.name} says holds {len(expected)} tensors, the first is "
                f"{expected[0]}; copy it."
            )
            continue
        found = read_tensor_file(index.with_name(shard))
        lost = [name for name in expected if name not in found]
        if lost:
            missing.append(f"{lost[0]} is not in {shard}, though {index.name} says so ({len(lost)} such tensors).")
        tensors |= found
    return Weights(tensors, frozenset(weight_map), tuple(missing))


def _read_safetensors(file: Path) -> dict[str, StoredTensor]:
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
            raise ModelError(
                f"{file} is no whole safetensors file: it has {size:,} bytes and announces a header of {length:,}. "
                "Copy it again."
            )
        try:
            header = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            tensors = {name: _from_header(file, name, entry, 8 + length) for name, entry in header.items()}
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ModelError(f"{file} has a damaged safetensors header ({error!r}); copy it again.") from error
    end = max((tensor.offset + tensor.num_bytes for tensor in tensors.values()), default=8 + length)
    if end != size:
        raise ModelError(
            f"{file} is cut off or damaged: its header describes {end:,} bytes, the file has {size:,}. Copy it again."
        )
    return tensors


def _from_header(file: Path, name: str, entry: dict[str, Any], start: int) -> StoredTensor:
    dtype, element_size = DTYPES[entry["dtype"]]
    shape = tuple(int(size) for size in entry["shape"])
    begin, end = entry["data_offsets"]
    if begin < 0 or end - begin != math.prod(shape) * element_size:
        raise ValueError(f"{name}: {end - begin} bytes for {entry['dtype']} {list(shape)}")
    return StoredTensor(file, name, dtype, shape, _contiguous(shape), start + begin, element_size)


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
