"""Reading of tensors in PyTorch's own files (``.bin``), without torch and without executing their pickles.

Such a file is a zip archive of plain bytes with a pickle that describes them. The pickle is read by ``tensor_pickle``,
which supports only how tensors are stored: unpickling runs any function that a file names, so a downloaded checkpoint
could otherwise execute code.
"""

import struct
import zipfile
from pathlib import Path
from typing import IO, NamedTuple

from llava_ray.errors import ModelError
from llava_ray.model.tensors.tensor_pickle import Code, PickledTensor, read_tensor_pickle
from llava_ray.reading import MAX_SHOWN, short_repr, wrap_errors

_MAX_PICKLE_BYTES = 16 * 2**20
_MAX_DIRECTORY_BYTES = 16 * 2**20  # of an archive; parsed, it takes up to 15 times as much memory
_MAX_SHARING = 4  # tensors may share bytes (tied heads), but a few bytes must not expand to terabytes
_END_OF_DIRECTORY, _ZIP64_LOCATOR, _ZIP64_END = b"PK\5\6", b"PK\6\7", b"PK\6\6"
_END_SIZE, _LOCATOR_SIZE, _MAX_COMMENT = 22, 20, 2**16


class _ArchiveMember(NamedTuple):
    """The range of a member's bytes in the archive."""

    offset: int
    num_bytes: int


def read_pickle(file: Path) -> dict[str, PickledTensor]:
    """Return the tensors of a file by name; other values (numbers, text) are ignored.

    Raises ModelError if it is damaged or refers to anything but tensors, OSError if it cannot be read.
    """
    remedy = "Copy it again. (Files older than PyTorch 1.6 have to be saved again by a newer one.)"
    with (
        file.open("rb") as stream,
        wrap_errors(f"{file}", remedy, says="is cut off, damaged or no PyTorch file of tensors"),
    ):
        _check_directory(stream)
        with zipfile.ZipFile(stream) as archive:
            members = _find_members(archive, stream)
        [index] = [name for name in members if name.endswith("/data.pkl")]
        root = index.removesuffix("data.pkl")
        _check_byte_order(members, root, stream)
        if members[index].num_bytes > _MAX_PICKLE_BYTES:
            raise ValueError(f"{index} has {members[index].num_bytes:,} bytes")
        try:
            values = read_tensor_pickle(_read(stream, members[index]), lambda key: members[f"{root}data/{key}"])
        except Code as code:
            raise _refused(file, str(code)) from code
        tensors = _tensors_of(values, file)
        _check_amount(tensors, file.stat().st_size)
    return tensors


def _refused(file: Path, what: str) -> ModelError:
    return ModelError(
        f"{file} holds more than tensors: it refers to {what[:MAX_SHOWN]}, which loading would execute. It is "
        "refused unread. If you trust its author, load it in an isolated environment and save it as safetensors."
    )


def _check_directory(stream: IO[bytes]) -> None:
    """Raise ValueError for an archive with an implausibly large directory, which zipfile reads as a whole."""
    size = stream.seek(0, 2)
    begin = stream.seek(max(0, size - _END_SIZE - _MAX_COMMENT - _LOCATOR_SIZE))
    tail = stream.read()
    place = tail.rfind(_END_OF_DIRECTORY)
    if place < 0 or len(tail) - place < _END_SIZE:
        raise ValueError("it has no zip directory")
    (directory,) = struct.unpack_from("<I", tail, place + 12)
    locator = place - _LOCATOR_SIZE
    if locator >= 0 and tail[locator : locator + 4] == _ZIP64_LOCATOR:
        (offset,) = struct.unpack_from("<Q", tail, locator + 8)
        for start in (offset, begin + locator - 56):  # zipfile reads the one before the locator
            stream.seek(min(start, size))
            record = stream.read(56)
            if record[:4] == _ZIP64_END and len(record) == 56:
                directory = max(directory if directory != 2**32 - 1 else 0, struct.unpack_from("<Q", record, 40)[0])
    if directory > min(size, _MAX_DIRECTORY_BYTES):
        raise ValueError(f"its directory of {directory:,} bytes cannot be that of a file of {size:,}")
    stream.seek(0)


def _find_members(archive: zipfile.ZipFile, stream: IO[bytes]) -> dict[str, _ArchiveMember]:
    """Return the ranges of the members' bytes. Raises ValueError for compressed, overlapping or outside members."""
    members: dict[str, _ArchiveMember] = {}
    for info in archive.infolist():
        if info.filename in members:
            raise ValueError(f"{short_repr(info.filename)} is in it twice")
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            raise ValueError(f"{short_repr(info.filename)} is compressed or encrypted, which PyTorch's never are")
        # Compressed members are refused above: their bytes could not be read in place, and may expand without bound.
        stream.seek(info.header_offset)
        local = stream.read(30)
        if local[:4] != b"PK\3\4" or len(local) < 30:
            raise ValueError(f"{short_repr(info.filename)} is not where the directory says")
        name_length, extra_length = struct.unpack("<26x2H", local)
        members[info.filename] = _ArchiveMember(info.header_offset + 30 + name_length + extra_length, info.file_size)
    end = 0
    for name, member in sorted(members.items(), key=lambda item: item[1]):
        if member.num_bytes and member.offset < end:
            raise ValueError(f"{short_repr(name)} overlaps the member before it")
        end = max(end, member.offset + member.num_bytes)
    if end > archive.start_dir:
        raise ValueError("a member reaches beyond the members' part of the file")
    return members


def _read(stream: IO[bytes], member: _ArchiveMember) -> bytes:
    stream.seek(member.offset)
    return stream.read(member.num_bytes)


def _check_byte_order(members: dict[str, _ArchiveMember], root: str, stream: IO[bytes]) -> None:
    order = members.get(f"{root}byteorder")
    if order is not None and _read(stream, order._replace(num_bytes=min(order.num_bytes, 100))).strip() != b"little":
        raise ValueError("its numbers are not in little-endian byte order: save it again on another machine")


def _tensors_of(values: object, file: Path) -> dict[str, PickledTensor]:
    if not isinstance(values, dict):
        raise ModelError(f"{file} holds a {type(values).__name__}; expected tensors by name.")
    return {name: t for name, t in values.items() if isinstance(t, PickledTensor) and isinstance(name, str)}


def _check_amount(tensors: dict[str, PickledTensor], size: int) -> None:
    """Raise ValueError for tensors that would take many times the file's size, as views of the same few bytes."""
    total = sum(tensor.num_bytes for tensor in tensors.values())
    if total > _MAX_SHARING * size:
        raise ValueError(f"its tensors would take {total:,} bytes, {total / size:,.0f} times those of the file")
