"""Reading of WebDataset tars by sample; damaged members are reported as faults, the others are read."""

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import PurePosixPath
from typing import Any

from llava_ray.data.records import IMAGE_SUFFIXES, Fault
from llava_ray.errors import DataError
from llava_ray.images.reading import open_filesystem
from llava_ray.reading import describe_error

# Unsupported media beside a record; any other file is ignored.
_OTHER_MEDIA = {
    ".mp4",
    ".mkv",
    ".webm",
    ".avi",
    ".mov",
    ".wav",
    ".mp3",
    ".flac",
    ".ogg",
    ".m4a",
    ".pdf",
    ".npy",
    ".npz",
}
_MAX_MEMBER = 1 << 30  # bytes
_ERRORS: Any = tarfile  # its header errors are missing in the stubs


@dataclass(frozen=True)
class TarMember:
    """One file of a tar: its content, or why that cannot be read."""

    key: str
    suffix: str
    content: bytes | Fault


@dataclass(frozen=True)
class TarSample:
    """Adjacent files with one base name."""

    key: str
    text: bytes | Fault
    images: tuple[bytes, ...] = ()
    ignored: tuple[str, ...] = ()


class CheckedTar(tarfile.TarFile):
    """A tar that counts damaged blocks: `tarfile` itself takes a damaged header for the end, in silence."""

    num_damaged = 0
    has_end = False


class CheckedHeader(tarfile.TarInfo):
    """A header reader that distinguishes damage from the end; blocks are skipped until the next valid header."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> "CheckedHeader":
        """Read the next header."""
        assert isinstance(tar, CheckedTar)
        assert tar.fileobj is not None
        try:
            header = super().fromtarfile(tar)
            if header.size >= 0:
                return header
        except _ERRORS.EOFHeaderError:
            tar.has_end = True
            raise
        except _ERRORS.EmptyHeaderError:
            raise
        except _ERRORS.TruncatedHeaderError as error:
            if tar.has_end:
                raise _ERRORS.EmptyHeaderError("a few bytes behind the end") from error
            raise tarfile.ReadError("unexpected end of data") from error
        except (tarfile.HeaderError, ValueError, LookupError, TypeError, AttributeError, OverflowError):
            pass
        tar.num_damaged += 1
        tar.offset = tar.fileobj.tell() - tarfile.BLOCKSIZE  # the next block is tried from here
        raise _ERRORS.InvalidHeaderError("damaged")


def read_tar(path: str) -> Iterator[TarSample]:
    """Yield the samples of a tar, images in the order of the tar. Raises DataError for a truncated tar."""
    for key, members in groupby(_members(path), key=lambda member: member.key):
        sample = _sample_of(key, list(members))
        if sample is not None:
            yield sample


def _sample_of(key: str, members: list[TarMember]) -> TarSample | None:
    """Build a sample from its files; None if none of them is a record or medium."""
    texts = [member.content for member in members if member.suffix == ".json"]
    images = [member.content for member in members if member.suffix in IMAGE_SUFFIXES]
    faults = [member.content for member in members if isinstance(member.content, Fault)]
    if faults:
        return TarSample(key, faults[0])
    if not texts and not images:
        return None
    if len(texts) != 1:
        return TarSample(
            key, Fault(f"{len(texts)} .json files of this name beside {len(images)} image(s); expected one")
        )
    others = {f"*{member.suffix}" for member in members} - {"*.json", *(f"*{suffix}" for suffix in IMAGE_SUFFIXES)}
    return TarSample(key, texts[0], tuple(image for image in images if isinstance(image, bytes)), tuple(sorted(others)))


def _members(path: str) -> Iterator[TarMember]:
    """Yield a tar's files; without content if they are neither records nor images."""
    filesystem, place = open_filesystem(path)
    key, num_damaged = "", 0
    try:
        with (
            filesystem.open(place, "rb") as raw,
            CheckedTar.open(fileobj=raw, mode="r|*", tarinfo=CheckedHeader, ignore_zeros=True) as tar,
        ):
            for header in tar:
                if tar.num_damaged > num_damaged:
                    yield _damage(key, tar.num_damaged - num_damaged)
                    num_damaged = tar.num_damaged
                if header.isdir():
                    continue
                name = PurePosixPath(header.name)
                key, suffix = str(name.parent / name.name.partition(".")[0]), name.suffix.lower()
                yield TarMember(key, suffix, _content(tar, header, suffix))
            if tar.num_damaged > num_damaged:
                yield _damage(key, tar.num_damaged - num_damaged)
    except Exception as error:  # tarfile, zlib, lzma and the file system each raise their own on damage
        raise DataError(
            f"{path}: the tar is damaged after {key!r} ({describe_error(error)}); fetch it again"
        ) from error


def _damage(key: str, num_blocks: int) -> TarMember:
    what = f"{num_blocks} damaged block(s) after {key!r} are unreadable; their content is lost: fetch the tar again"
    return TarMember(f"{key}+damaged", "", Fault(what))


def _content(tar: tarfile.TarFile, header: tarfile.TarInfo, suffix: str) -> bytes | Fault:
    if suffix in _OTHER_MEDIA:
        return Fault(f"{suffix} beside the record is not supported: remove it, or the sample", "unsupported")
    if suffix != ".json" and suffix not in IMAGE_SUFFIXES:
        return b""
    if not header.isreg() or header.issparse():
        return Fault(f"{header.name!r} is a link or a sparse file; expected the file itself")
    if header.size > _MAX_MEMBER:
        return Fault(f"{header.name!r} has {header.size:,} bytes; expected at most {_MAX_MEMBER:,}")
    content = tar.extractfile(header)
    return content.read() if content else b""
