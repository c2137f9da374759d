"""Files on any filesystem: paths that hold on all nodes, and atomic writes."""

import os
import uuid
from pathlib import Path

from llava_ray.errors import DataError
from llava_ray.images.reading import open_filesystem


def absolute_path(path: str) -> str:
    """Return a local path as an absolute one, since workers may run in another folder; a URL unchanged."""
    return path.rstrip("/") if "://" in path else str(Path(path).expanduser().absolute())


def relative_path(folder: str, path: str) -> str:
    """Return a path below the current folder as a path relative to ``folder``; any other path unchanged.

    Relative paths within a project stay valid when the whole project is moved or copied.
    """
    if "://" in folder or "://" in path or not Path(path).is_relative_to(Path.cwd()):
        return path
    return os.path.relpath(path, folder)


def read_stored(path: str) -> bytes:
    """Read a whole file; raises FileNotFoundError."""
    filesystem, place = open_filesystem(path)
    return bytes(filesystem.cat_file(place))


def file_size(path: str) -> int | None:
    """Return the size in bytes, or None where the file does not exist; raises DataError where access is denied."""
    filesystem, place = open_filesystem(path)
    try:
        return int(filesystem.info(place)["size"])
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise DataError(f"cannot look for {path!r}: {error}; check the address and your credentials") from error


def list_sizes(folder: str) -> dict[str, int]:
    """Return the sizes of a folder's files by name; empty where the folder does not exist."""
    filesystem, place = open_filesystem(folder)
    filesystem.invalidate_cache()  # fsspec caches listings, but other processes write here
    try:
        entries = filesystem.ls(place, detail=True)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    return {entry["name"].rpartition("/")[2]: int(entry["size"]) for entry in entries if entry["type"] == "file"}


def write_stored(path: str, data: bytes | memoryview) -> None:
    """Write a whole file under a temporary name and rename it, so that readers find all of it or nothing.

    Raises DataError that names the path where it cannot be written (permissions, a full disk).
    """
    filesystem, place = open_filesystem(path)
    # A random suffix: two tasks that write the same file at once must not share a temporary one.
    temporary = f"{place}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        filesystem.makedirs(place.rpartition("/")[0], exist_ok=True)
        try:
            filesystem.pipe_file(temporary, data)
            filesystem.mv(temporary, place)
        except OSError:
            if filesystem.exists(temporary):
                filesystem.rm_file(temporary)
            raise
    except OSError as error:
        raise _unwritable(path, len(data), error) from error


def write_tail(path: str, start: int, data: bytes) -> None:
    """Replace everything after the first ``start`` bytes of a file by ``data``; return when it is on storage.

    A local file is changed in place; a store without such writes, as S3, gets the whole file anew. A kill in between
    leaves the first ``start`` bytes and a part of ``data``. Raises DataError as ``write_stored`` does.
    """
    if "://" in path:
        write_stored(path, (read_stored(path)[:start] if start else b"") + data)
        return
    place = Path(path)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with place.open("r+b" if start else "wb") as file:
            file.truncate(start)
            file.seek(start)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise _unwritable(path, len(data), error) from error


def _unwritable(path: str, size: int, error: OSError) -> DataError:
    """Return the error of a file that cannot be written, with the remedy."""
    return DataError(
        f"cannot write {path!r} ({size:,} bytes): {error}; make room or choose a folder that can be written, "
        "data.cache_dir or run.storage_path"
    )
