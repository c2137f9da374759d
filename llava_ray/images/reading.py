"""Image files read from wherever they lie; what opens them is handed on from `opening`."""

from functools import cache
from pathlib import Path

import fsspec
import fsspec.core
import pyarrow
import pyarrow.fs
from fsspec.implementations.arrow import ArrowFSWrapper

from llava_ray.errors import DataError, ImageError
from llava_ray.images.opening import check_header, check_image, open_image, to_rgb

__all__ = ["check_header", "check_image", "open_filesystem", "open_image", "read_bytes", "to_rgb"]


def open_filesystem(path: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """Return the filesystem of a local path or URL, and the path on it.

    fsspec's drivers come first (s3fs, gcsfs, ...); where one is not installed, pyarrow's own S3, GCS, Azure and HDFS
    serve. Raises DataError for a scheme that neither knows.
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


def read_bytes(path: str) -> bytes:
    """Read a file from a local path or any fsspec URL.

    Raises ImageError with reason ``image_missing`` where there is no such file and ``image_unreadable`` where it may
    not be read; DataError where the storage itself fails, which is no fault of the record.
    """
    try:
        if "://" not in path:
            return Path(path).read_bytes()
        filesystem, place = open_filesystem(path)
        return bytes(filesystem.cat_file(place))
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise ImageError(
            f"image {path!r} does not exist; check data.image_folder, or fetch the file", reason="image_missing"
        ) from error
    except PermissionError as error:
        raise ImageError(
            f"image {path!r} may not be read ({error}); give this user read permission", reason="image_unreadable"
        ) from error
    except OSError as error:
        raise DataError(
            f"reading image {path!r} failed ({error}): the storage did not answer; start again when it does, "
            "finished shards are kept"
        ) from error
