"""A disk that is full or read-only while a checkpoint is written: the error names the folder and the remedy."""

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llava_ray.errors import CheckpointError

# Parts of the messages of torch's file writer and of Arrow for a full disk.
_FAILED_WRITES = ("PytorchStreamWriter", "file write failed", "iostream error", "inline_container.cc", "No space left")


@contextmanager
def naming_disk(folder: Path, step: int, remedy: str) -> Iterator[None]:
    """Raise CheckpointError in place of an error of the disk on which ``folder`` is."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        if not _disk_trouble(error):
            raise
        raise CheckpointError(
            f"cannot write the checkpoint of step {step} to {folder}{_free_space(folder)}: {error}; free some space or "
            f"{remedy}, then start the run again: it resumes from the last complete checkpoint"
        ) from error


def _free_space(folder: Path) -> str:
    """Return in words how much is free on a folder's disk; nothing for one on remote storage."""
    near = next((place for place in (folder, *folder.parents) if place.exists()), None)
    return f" ({shutil.disk_usage(near).free / 2**30:.1f} GiB free there)" if near and folder.is_absolute() else ""


def _disk_trouble(error: BaseException) -> bool:
    """Return whether the disk caused an error: torch wraps a full disk in a RuntimeError of its file writer."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)
    return any(words in str(error) for words in _FAILED_WRITES)
