"""What files of weights hold, from their headers alone: names, shapes and where the bytes are. No torch.

A safetensors file begins with such a header. A PyTorch file (``.bin``) is a zip archive with a pickle, which is read
here by an unpickler that knows how tensors are written and nothing else, so nothing in it is ever run.
"""

import json
import math
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from llava_ray.errors import ModelError

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
STORAGES = {
    "DoubleStorage": "F64",
    "FloatStorage": "F32",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "LongStorage": "I64",
    "IntStorage": "I32",
    "ShortStorage": "I16",
    "CharStorage": "I8",
    "ByteStorage": "U8",
    "BoolStorage": "BOOL",
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
        return _read_safetensors(file) if file.suffix == ".safetensors" else _read_pickled(file)
    except OSError as error:
        raise ModelError(f"{file} cannot be read ({error.strerror}); copy it again, or mend its permissions.") from error


@dataclass(frozen=True)
class Weights:
    """The weight files of a folder. ``names`` are all tensors that it should hold, ``missing`` says what it lacks."""

    tensors: dict[str, StoredTensor]
    names: frozenset[str]
    missing: tuple[str, ...] = ()


def read_weights(folder: Path) -> Weights:
    """Read the headers of a folder's weight files, in transformers' order of preference; there may be none.

    Raises ModelError for a file that is damaged; one that is not there is only said to be missing.
    """
    for stem, ending in (("model", "safetensors"), ("pytorch_model", "bin")):
        single, index = folder / f"{stem}.{ending}", folder / f"{stem}.{ending}.index.json"
        if single.is_file():
            tensors = read_tensor_file(single)
            return Weights(tensors, frozenset(tensors))
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


def _read_pickled(file: Path) -> dict[str, StoredTensor]:
    try:
        with zipfile.ZipFile(file) as archive:
            [index] = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            root = index.removesuffix("data.pkl")
            with archive.open(index) as stream:
                values = _TensorUnpickler(stream, file, lambda key: _find_bytes(archive, f"{root}data/{key}")).load()
    except ModelError:
        raise
    except (zipfile.BadZipFile, ValueError, KeyError, struct.error, pickle.UnpicklingError, EOFError) as error:
        raise ModelError(
            f"{file} is cut off, damaged or no PyTorch file of tensors ({error}); copy it again. (Files older than "
            "PyTorch 1.6 have to be saved again by a newer one.)"
        ) from error
    if not isinstance(values, dict):
        raise ModelError(f"{file} holds a {type(values).__name__}; expected tensors by name.")
    return {
        name: StoredTensor(file, name, *vars(value).values())
        for name, value in values.items()
        if isinstance(value, _Pickled)
    }


def _find_bytes(archive: zipfile.ZipFile, name: str) -> tuple[int, int]:
    """Return where a member's bytes begin in the archive, and how many there are."""
    member = archive.getinfo(name)
    if member.compress_type != zipfile.ZIP_STORED or archive.fp is None:
        raise ValueError(f"{name} is compressed")
    archive.fp.seek(member.header_offset)
    local = archive.fp.read(30)
    name_length, extra_length = struct.unpack("<26x2H", local)
    return member.header_offset + 30 + name_length + extra_length, member.file_size


@dataclass
class _Pickled:
    """A tensor as its pickle describes it; the fields are StoredTensor's after its name."""

    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    element_size: int


@dataclass
class _Storage:
    dtype: str
    element_size: int
    offset: int
    num_bytes: int


class _TensorUnpickler(pickle.Unpickler):
    """Reads what ``torch.save`` writes of tensors in dicts; refuses every other class and function unseen."""

    def __init__(self, stream: Any, file: Path, find_bytes: Callable[[str], tuple[int, int]]) -> None:
        """Take the pickle, its file's name for messages, and what finds a storage's bytes in the file."""
        super().__init__(stream)
        self.file = file
        self.find_bytes = find_bytes

    def find_class(self, module: str, name: str) -> Any:
        """Return a stand-in for what tensors are made of. Raises ModelError for anything else."""
        known: dict[tuple[str, str], Any] = {
            ("collections", "OrderedDict"): OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
            ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
        }
        if module == "torch" and name in STORAGES:
            return name
        if (module, name) not in known:
            _refuse_code(self.file, f"{module}.{name}")
        return known[module, name]

    def persistent_load(self, pid: Any) -> _Storage:
        """Return where a storage lies."""
        kind, storage, key, _, numel = pid
        if kind != "storage" or storage not in STORAGES:
            raise pickle.UnpicklingError(f"unknown storage {pid!r}")
        dtype, element_size = DTYPES[STORAGES[storage]]
        offset, num_bytes = self.find_bytes(str(key))
        if num_bytes < numel * element_size:
            raise ValueError(f"storage {key} has {num_bytes} bytes of {numel * element_size}")
        return _Storage(dtype, element_size, offset, num_bytes)


def _rebuild_tensor(storage: _Storage, start: int, shape: Any, stride: Any, *_: Any) -> _Pickled:
    offset = storage.offset + start * storage.element_size
    tensor = _Pickled(storage.dtype, tuple(shape), tuple(stride), offset, storage.element_size)
    last = StoredTensor(Path(), "", *vars(tensor).values()).span * storage.element_size
    if start < 0 or offset + last > storage.offset + storage.num_bytes:
        raise ValueError(f"a tensor of shape {tensor.shape} reaches beyond its storage")
    return tensor


def _refuse_code(file: Path, what: str) -> NoReturn:
    raise ModelError(
        f"{file} holds more than tensors: it refers to {what}, which loading would run. It is refused unread. If you "
        "trust its maker, load it where nothing can be lost and save its tensors as safetensors."
    )


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
