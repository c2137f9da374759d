"""Reading of image files from any storage; the functions of `opening` are exported here too."""

import errno
import os
import stat
from functools import cache
from pathlib import Path

import fsspec
import fsspec.core
import pyarrow
import pyarrow.fs
from fsspec.implementations.arrow import ArrowFSWrapper

from llava_ray.errors import DataError, ImageError, LlavaRayError
from llava_ray.images.fetching import fetch_image
from llava_ray.images.opening import check_header, check_image, open_image, to_rgb
from llava_ray.reading import describe_error, short_repr

__all__ = ["check_header", "check_image", "open_filesystem", "open_image", "read_bytes", "to_rgb"]


def open_filesystem(path: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """Return the filesystem of a local path or URL, and the path on it.

    fsspec's drivers are tried first (s3fs, gcsfs, ...); where one is not installed, pyarrow's own S3, GCS, Azure and
    HDFS are used. Raises DataError for a scheme that neither supports.
    """
    scheme, _, rest = path.partition("://")
    if not rest:
        return fsspec.filesystem("file"), str(Path(path).expanduser().absolute())
    try:
        filesystem, place = fsspec.core.url_to_fs(path)
    except (ImportError, ValueError) as error:
        root, _, below = rest.partition("/")
        filesystem, start = _arrow_filesystem(f"{scheme}://{root}", str(error))
        return filesystem, f"{start}/{below}" if below else start
    return filesystem, str(place)


@cache
def _arrow_filesystem(root: str, problem: str) -> tuple[fsspec.AbstractFileSystem, str]:
    try:
        filesystem, start = pyarrow.fs.FileSystem.from_uri(root)
    except (pyarrow.ArrowInvalid, pyarrow.ArrowNotImplementedError, OSError) as error:
        raise DataError(
            f"{root}: cannot be opened: {problem}; pyarrow: {error}. Check the address, or install the package named"
        ) from error
    return ArrowFSWrapper(filesystem), start.rstrip("/")


# System errors about one path, not the storage: name too long, not a file, a loop of links, no such device.
_OF_ONE_NAME = {errno.ENAMETOOLONG, errno.EINVAL, errno.ELOOP, errno.ENXIO, errno.ENODEV, errno.EILSEQ}


def read_bytes(path: str, home: str | None = None) -> bytes:
    """Read a file from a local path or any fsspec URL.

    Raises ImageError with reason ``image_missing`` where the file does not exist and ``image_unreadable`` where access
    is denied, the scheme is unknown, or a web server does not deliver it; DataError where the storage itself fails,
    which is not the record's fault. With ``home``, the folder of all other images, a failure of any other storage is
    the record's fault: only that record names it.
    """
    try:
        if "://" not in path:
            return _read_local(path)
        if path.lower().startswith(("http://", "https://")):
            return fetch_image(fsspec.filesystem("http"), path)
        filesystem, place = _open_place(path)
        return bytes(filesystem.cat_file(place))
    except LlavaRayError:
        raise
    except Exception as error:  # each file system has exceptions of its own
        raise _convert_failure(path, error, home) from error


def _convert_failure(path: str, error: Exception, home: str | None) -> DataError:
    """Convert a failure to an ImageError of one image, or return a DataError of the storage."""
    name = short_repr(path)
    if isinstance(error, FileNotFoundError | IsADirectoryError | NotADirectoryError):
        return ImageError(
            f"image {name} does not exist; check data.image_folder, or fetch the file", reason="image_missing"
        )
    if isinstance(error, PermissionError):
        return ImageError(
            f"image {name} may not be read ({describe_error(error)}); give this user read permission",
            reason="image_unreadable",
        )
    # A NUL or a lone surrogate in a path, the home of an unknown user: not an OSError.
    if isinstance(error, ValueError | RuntimeError) or (isinstance(error, OSError) and error.errno in _OF_ONE_NAME):
        return ImageError(
            f"image {name} is not a valid file name ({describe_error(error)}); check the record", reason="image_missing"
        )
    # Errors of a driver for other addresses, and of storage that only this record names.
    is_elsewhere = "://" in path and home is not None and _root_of(path) != _root_of(home)
    if is_elsewhere or isinstance(error, TypeError | AttributeError):
        return ImageError(
            f"image {name} cannot be read ({describe_error(error)}); check the address, or copy the file to "
            "data.image_folder",
            reason="image_unreadable",
        )
    remedy = (
        "the storage did not answer; start again when it does"
        if isinstance(error, OSError)
        else "check the address and your credentials, and start again"
    )
    return DataError(f"reading image {name} failed ({describe_error(error)}): {remedy}; finished shards are kept")


def _root_of(path: str) -> tuple[str, str]:
    """Return the scheme and the host (or bucket) of an address; empty for a local path."""
    scheme, _, rest = path.partition("://")
    return (scheme.lower(), rest.partition("/")[0].lower()) if rest else ("", "")


def _read_local(path: str) -> bytes:
    with Path(path).open("rb") as stream:
        kind = os.fstat(stream.fileno()).st_mode
        if stat.S_ISCHR(kind) or stat.S_ISBLK(kind):
            raise OSError(errno.ENODEV, "a device, not a file")
        return stream.read()


def _open_place(path: str) -> tuple[fsspec.AbstractFileSystem, str]:
    try:
        return open_filesystem(path)
    except OSError:
        raise
    except Exception as error:  # only this record's address is at fault
        message = str(error) if isinstance(error, DataError) else describe_error(error)
        raise ImageError(f"image {short_repr(path)}: {message}", reason="image_unreadable") from error
