"""Tensors in PyTorch's own files (``.bin``), without torch and without running anything.

Such a file is a zip archive of plain bytes with a pickle that describes them. It is read here by an unpickler that
knows how tensors are written and nothing else.
"""

import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from llava_ray.errors import ModelError

# Classes of typed storages: torch's name of the dtype, and bytes of one element.
STORAGES = {
    "DoubleStorage": ("float64", 8),
    "FloatStorage": ("float32", 4),
    "HalfStorage": ("float16", 2),
    "BFloat16Storage": ("bfloat16", 2),
    "LongStorage": ("int64", 8),
    "IntStorage": ("int32", 4),
    "ShortStorage": ("int16", 2),
    "CharStorage": ("int8", 1),
    "ByteStorage": ("uint8", 1),
    "BoolStorage": ("bool", 1),
}


# What comes of reading a file that is cut off, or is no such file at all.
DAMAGED = (
    zipfile.BadZipFile,
    pickle.UnpicklingError,
    struct.error,
    EOFError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
)


class PickledTensor(NamedTuple):
    """A tensor as its pickle describes it: ``stride`` in elements, ``offset`` in bytes from the file's beginning."""

    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    element_size: int


class Storage(NamedTuple):
    """A run of bytes in the file that tensors are views of."""

    dtype: str
    element_size: int
    offset: int
    num_bytes: int


def read_pickle(file: Path) -> dict[str, PickledTensor]:
    """Return the tensors of a file by name; what else it holds (numbers, text) is passed over.

    Raises ModelError if it is damaged or refers to anything but tensors, OSError if it cannot be read.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            [index] = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            root = index.removesuffix("data.pkl")
            with archive.open(index) as stream:
                values = _TensorUnpickler(stream, file, lambda key: _find_bytes(archive, f"{root}data/{key}")).load()
    except ModelError:
        raise
    except DAMAGED as error:
        raise ModelError(
            f"{file} is cut off, damaged or no PyTorch file of tensors ({error}); copy it again. (Files older than "
            "PyTorch 1.6 have to be saved again by a newer one.)"
        ) from error
    if not isinstance(values, dict):
        raise ModelError(f"{file} holds a {type(values).__name__}; expected tensors by name.")
    return {name: tensor for name, tensor in values.items() if isinstance(tensor, PickledTensor)}


def _find_bytes(archive: zipfile.ZipFile, name: str) -> tuple[int, int]:
    """Return where a member's bytes begin in the archive, and how many there are."""
    member = archive.getinfo(name)
    if member.compress_type != zipfile.ZIP_STORED or archive.fp is None:
        raise ValueError(f"{name} is compressed")
    archive.fp.seek(member.header_offset)
    local = archive.fp.read(30)
    name_length, extra_length = struct.unpack("<26x2H", local)
    return member.header_offset + 30 + name_length + extra_length, member.file_size


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

    def persistent_load(self, pid: Any) -> Storage:
        """Return where a storage lies."""
        kind, storage, key, _, numel = pid
        if kind != "storage" or storage not in STORAGES:
            raise pickle.UnpicklingError(f"unknown storage {pid!r}")
        dtype, element_size = STORAGES[storage]
        offset, num_bytes = self.find_bytes(str(key))
        if num_bytes < numel * element_size:
            raise ValueError(f"storage {key} has {num_bytes} bytes of {numel * element_size}")
        return Storage(dtype, element_size, offset, num_bytes)


def _rebuild_tensor(storage: Storage, start: int, shape: Any, stride: Any, *_: Any) -> PickledTensor:
    last = start + sum((size - 1) * step for size, step in zip(shape, stride, strict=True)) if 0 not in shape else start
    if start < 0 or (0 not in shape and (last + 1) * storage.element_size > storage.num_bytes):
        raise ValueError(f"a tensor of shape {tuple(shape)} reaches beyond its storage")
    offset = storage.offset + start * storage.element_size
    return PickledTensor(storage.dtype, tuple(shape), tuple(stride), offset, storage.element_size)


def _refuse_code(file: Path, what: str) -> NoReturn:
    raise ModelError(
        f"{file} holds more than tensors: it refers to {what}, which loading would run. It is refused unread. If you "
        "trust its maker, load it where nothing can be lost and save its tensors as safetensors."
    )
