"""The page's uploaded files: paths from a browser are resolved, and nothing outside the folder is read."""

import contextlib
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llava_ray.deployments.refusal import RefusalError, refuse

_MAX_PATH_CHARS = 4096
LEAST_FILE_BYTES = 64 * 1024  # the least that a file counts: the number of files on a disk is limited too
PARTIAL_S = 600.0  # after which every upload has ended or failed


@dataclass(frozen=True)
class Uploads:
    """The upload folder, with the limits of one chat."""

    folder: Path
    max_files: int
    """Images of one chat (max_images)."""
    max_bytes: int
    """Their bytes together, as a request would hold them (max_body_bytes)."""

    def resolve(self, path: str) -> Path:
        """Resolve a path with its links. Raises RefusalError (400) for a URL, or a place outside the folder."""
        try:
            if len(path) <= _MAX_PATH_CHARS and "://" not in path:
                place = Path(path).resolve()
                if place.is_absolute() and place != self.root and place.is_relative_to(self.root):
                    return place
        except (OSError, ValueError, RuntimeError):  # a null byte, a name that is too long, links in a circle
            pass
        raise refuse(400, "a file that was not uploaded to this page; attach the image again", "page_file", "files")

    @property
    def root(self) -> Path:
        """Return the folder with links resolved."""
        return self.folder.resolve()

    def read_all(self, paths: Sequence[str]) -> dict[str, bytes]:
        """Read the files of one chat, each once. Raises RefusalError, for too many bytes before reading."""
        self.check(paths)
        return {path: self.read(self.resolve(path)) for path in set(paths)}

    def check(self, paths: Sequence[str]) -> int:
        """Return the bytes of one chat's files in a request, counting repeated ones each time.

        Raises RefusalError for too many files or bytes, and for places outside the folder.
        """
        if len(paths) > self.max_files:
            raise refuse(
                400, f"{len(paths)} images; at most {self.max_files} a request (max_images)", "too_many_images", "files"
            )
        num_bytes = sum(self.encoded_size(self.resolve(path)) for path in paths)
        if num_bytes > self.max_bytes:
            raise refuse(
                400,
                f"the images of this chat have {num_bytes:,} bytes in a request; at most {self.max_bytes:,} "
                "(max_body_bytes); start a new chat with fewer or smaller ones",
                "body_too_large",
                "files",
            )
        return num_bytes

    def total_bytes(self) -> int:
        """Return the bytes in the folder; each file counts at least LEAST_FILE_BYTES."""
        total = 0
        for folder, _, names in os.walk(self.folder):
            for name in names:
                with contextlib.suppress(OSError):  # deleted meanwhile
                    size = os.lstat(os.path.join(folder, name)).st_size  # noqa: PTH118 - thousands of them
                    total += max(size, LEAST_FILE_BYTES)
        return total

    def delete_partial(self) -> None:
        """Delete files of interrupted uploads; complete ones lie in subfolders."""
        border = time.time() - PARTIAL_S
        with contextlib.suppress(FileNotFoundError):  # no upload yet
            for place in self.folder.iterdir():
                with contextlib.suppress(OSError):  # deleted meanwhile
                    if place.is_file() and not place.is_symlink() and place.stat().st_mtime < border:
                        place.unlink()

    def encoded_size(self, place: Path) -> int:
        """Return a file's length in base64. Raises RefusalError if it no longer exists."""
        try:
            return place.stat().st_size * 4 // 3
        except OSError:
            raise _deleted_error() from None

    def read(self, place: Path) -> bytes:
        """Read a file that has been resolved. Raises RefusalError if it no longer exists."""
        try:
            if not place.is_file():  # reading a pipe would block
                raise _deleted_error()
            return place.read_bytes()
        except OSError:
            raise _deleted_error() from None


def _deleted_error() -> RefusalError:
    """Return the error for a deleted file: uploads are deleted after a day."""
    return refuse(400, "an image of this chat has been deleted; attach it again", "media_local", "files")
