"""Contents of weight files from their headers alone: names, shapes and byte offsets. No torch."""

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from llava_ray.errors import ModelError
from llava_ray.model.tensors.pickled_tensors import read_pickle
from llava_ray.reading import LARGE_INT_BITS, MAX_SHOWN, check_plain, is_file, read_bounded, short_repr, wrap_errors

# Stored by older versions of transformers, and computed by newer ones.
_COMPUTED = re.compile(r"(rotary_emb\.inv_freq|embeddings\.position_ids)$")
# Of a header, and of every JSON file beside weights: parsed it takes up to 25 times as much memory.
_MAX_HEADER_BYTES = _MAX_JSON_BYTES = 16 * 2**20
_MAX_SIDE = 2**48  # of a tensor, in elements
_MAX_AXES = 8

NO_WEIGHTS = (
    "it holds no weights; expected model.safetensors or pytorch_model.bin, or shards of one with their index file."
)

# Names of dtypes as torch spells them, and bytes of one element.
_DTYPES = {
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
    except (OSError, ValueError) as error:
        if isinstance(error, ModelError):
            raise
        why = getattr(error, "strerror", None) or error
        raise ModelError(f"{file} cannot be read ({why}); copy it again, or fix its permissions.") from error


@dataclass(frozen=True)
class WeightFiles:
    """The weight files of a folder. ``names`` are all tensors that it should hold, ``missing`` says what it lacks."""

    tensors: dict[str, StoredTensor]
    names: frozenset[str]
    missing: tuple[str, ...] = ()

    @classmethod
    def of(cls, tensors: dict[str, StoredTensor]) -> Self:
        """Build from a complete set of tensors."""
        return cls(tensors, frozenset(tensors))

    def renamed(self, rename: Callable[[str], str]) -> Self:
        """Rename the weights, and drop those that newer versions of transformers compute."""
        tensors: dict[str, StoredTensor] = {}
        for name, tensor in self.tensors.items():
            if _COMPUTED.search(name):
                continue
            if (other := tensors.get(rename(name))) is not None:
                raise ModelError(f"{tensor.file}: {name} is the same tensor as {other.name} in {other.file.name}.")
            tensors[rename(name)] = tensor
        names = frozenset(rename(name) for name in self.names if not _COMPUTED.search(name))
        return replace(self, tensors=tensors, names=names)

    def below(self, part: str) -> Self:
        """Return the weights under a part's prefix."""
        return self.renamed(lambda own: f"{part}.{own}")


def read_weights(folder: Path) -> WeightFiles:
    """Read the headers of a folder's weight files, in transformers' order of preference; there may be none.

    Raises ModelError for a file that is damaged; an absent one is only listed as missing.
    """
    for stem, ending in (("model", "safetensors"), ("pytorch_model", "bin")):
        single, index = folder / f"{stem}.{ending}", folder / f"{stem}.{ending}.index.json"
        if is_file(single):
            return WeightFiles.of(read_tensor_file(single))
        if is_file(index):
            return _read_shards(index)
    return WeightFiles({}, frozenset(), (NO_WEIGHTS,))


def read_json_object(file: Path, limit: int = _MAX_JSON_BYTES) -> dict[str, Any]:
    """Read a JSON file that holds an object. Raises ModelError that names it, and the key of a value at fault."""
    try:
        values = json.loads(read_bounded(file, limit), parse_constant=_parse_constant)
    except OSError as error:
        raise ModelError(f"{file} cannot be read ({error.strerror}).") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"{file} is not JSON ({error}): it was cut off or edited. Copy it again.") from error
    if not isinstance(values, dict):
        raise ModelError(f"{file} holds a {type(values).__name__}; expected a JSON object. Copy it again.")
    check_plain(values, str(file), bits=LARGE_INT_BITS)
    return values


def _parse_constant(word: str) -> float:
    if word == "NaN":  # never a valid setting, unlike Infinity, which some models have
        raise ValueError("NaN is no value")
    return float(word)


def _read_shards(index: Path) -> WeightFiles:
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{index} has no weight_map that says which shard holds which tensor; copy it again.")
    expected: dict[str, list[str]] = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard or shard in ("", "..") or "\0" in shard:
            raise ModelError(
                f"{index}: weight_map says that {short_repr(name)} is in {short_repr(shard)}, which names no "
                "file of this "
                "folder; copy it again."
            )
        expected.setdefault(shard, []).append(name)
    tensors: dict[str, StoredTensor] = {}
    missing = []
    for shard, names in sorted(expected.items()):
        if not is_file(index.with_name(shard)):
            missing.append(
                f"shard {shard[:200]} is not there, which {index.name} says holds {len(names)} tensors, the first is "
                f"{names[0]}; copy it."
            )
            continue
        found = read_tensor_file(index.with_name(shard))
        lost = [name for name in names if name not in found]
        if lost:
            missing.append(f"{lost[0]} is not in {shard}, though {index.name} says so ({len(lost)} such tensors).")
        if twice := tensors.keys() & found.keys():
            raise ModelError(f"{index.with_name(shard)}: {min(twice)} is in another shard as well; copy them again.")
        tensors |= found
    return WeightFiles(tensors, frozenset(weight_map), tuple(missing))


def _read_safetensors(file: Path) -> dict[str, StoredTensor]:
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or not 2 <= length <= size - 8:
            raise ModelError(
                f"{file} is not a whole safetensors file: it has {size:,} bytes and announces a header of {length:,}. "
                "Copy it again."
            )
        if length > _MAX_HEADER_BYTES:
            raise ModelError(
                f"{file} announces a header of {length:,} bytes, expected at most {_MAX_HEADER_BYTES:,}. Save its "
                "tensors in several files."
            )
        text = stream.read(length)
    with wrap_errors(f"{file}", "Copy it again.", says="has a damaged safetensors header"):
        header = json.loads(text.decode(), object_pairs_hook=_without_duplicates, parse_constant=_reject_constant)
        header.pop("__metadata__", None)
        tensors = {name: _from_header(file, name, entry, 8 + length) for name, entry in header.items()}
    end = _find_end(file, tensors, 8 + length)
    if end != size:
        raise ModelError(
            f"{file} is cut off or damaged: its header describes {end:,} bytes, the file has {size:,}. Copy it again."
        )
    return tensors


def read_metadata(file: Path) -> dict[str, str]:
    """Return the metadata of a .safetensors file whose header has been checked. Raises ModelError."""
    with wrap_errors(f"{file}", "Copy it again.", says="has a damaged safetensors header"), file.open("rb") as stream:
        length = min(int.from_bytes(stream.read(8), "little"), _MAX_HEADER_BYTES)
        noted = json.loads(stream.read(length)).get("__metadata__") or {}
        return {key: value for key, value in noted.items() if isinstance(value, str)}


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"{short_repr(twice)} occurs twice")
    return values


def _reject_constant(word: str) -> float:
    raise ValueError(f"{word} is not JSON")


def _from_header(file: Path, name: str, entry: Any, start: int) -> StoredTensor:
    label = name[:MAX_SHOWN]
    if not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str) or entry["dtype"] not in _DTYPES:
        raise ValueError(f"{label}: the dtype in {short_repr(entry)} is none of {', '.join(_DTYPES)}")
    dtype, element_size = _DTYPES[entry["dtype"]]
    shape: Any = entry.get("shape")
    offsets: Any = entry.get("data_offsets")
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise ValueError(
            f"{label}: shape {short_repr(shape)} and data_offsets {short_repr(offsets)} are not lists of sizes"
        )
    begin, end = offsets
    if min(begin, 0, *shape) < 0 or end - begin != math.prod(shape) * element_size:
        raise ValueError(f"{label}: {end - begin} bytes for {entry['dtype']} {short_repr(shape)}")
    return StoredTensor(file, name, dtype, tuple(shape), _contiguous(tuple(shape)), start + begin, element_size)


def _are_sizes(values: Any) -> bool:
    return (
        isinstance(values, list)
        and len(values) <= _MAX_AXES
        and all(type(value) is int and abs(value) <= _MAX_SIDE for value in values)
    )


def _find_end(file: Path, tensors: dict[str, StoredTensor], start: int) -> int:
    """Return the end of the tensors. Raises ModelError where tensors overlap or leave gaps."""
    end = start
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.offset, tensor.num_bytes)):
        if tensor.offset != end:
            fault = "overlaps the tensor before it" if tensor.offset < end else "leaves a gap before it"
            raise ModelError(f"{file} is damaged: {short_repr(tensor.name)} {fault}. Copy it again.")
        end = tensor.offset + tensor.num_bytes
    return end


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
