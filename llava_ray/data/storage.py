"""Files on any filesystem: named once for all nodes, and written so that nobody ever sees half of one."""

import os
import uuid
from pathlib import Path

from llava_ray.errors import DataError
from llava_ray.images.reading import open_filesystem


def absolute(path: str) -> str:
    """Return a URL as it is and a local path from the root: workers may run in another folder."""
    return path.rstrip("/") if "://" in path else str(Path(path).expanduser().absolute())


def way_from(folder: str, path: str) -> str:
    """Return a local path below the current folder as the way to it from another one; any other path as it is.

    What lies in one project keeps its way when all of it is moved or copied; what lies elsewhere stays.
    """
    if "://" in folder or "://" in path or not Path(path).is_relative_to(Path.cwd()):
        return path
    return os.path.relpath(path, folder)


def read_stored(path: str) -> bytes:
    """Read a whole file; raises FileNotFoundError."""
    filesystem, place = open_filesystem(path)
    return bytes(filesystem.cat_file(place))


def file_size(path: str) -> int | None:
    """Return the size in bytes, or None where there is no such file; raises DataError where nobody may know."""
    filesystem, place = open_filesystem(path)
    try:
        return int(filesystem.info(place)["size"])
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise DataError(f"cannot look for {path!r}: {error}; check the address and your credentials") from error


def list_sizes(folder: str) -> dict[str, int]:
    """Return the sizes of a folder's files by name; empty where there is no such folder."""
    filesystem, place = open_filesystem(folder)
    filesystem.invalidate_cache()  # other processes write here
    try:
        entries = filesystem.ls(place, detail=True)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    return {entry["name"].rpartition("/")[2]: int(entry["size"]) for entry in entries if entry["type"] == "file"}


def write_stored(path: str, data: bytes | memoryview) -> None:
    """Write a whole file under a temporary name and rename it: two writers cannot mix, a reader finds all or nothing.

    Raises DataError that names the path where it cannot be written (permissions, a full disk).
    """
    filesystem, place = open_filesystem(path)
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
        raise DataError(
            f"cannot write {path!r} ({len(data):,} bytes): {error}; make room or choose a folder that can be written, "
            "data.cache_dir or run.storage_path"
        ) from error
