"""A file of rows by step that only grows: new rows are appended, and rows of steps that are repeated are cut off.

Rows stand in the order of their steps, one JSON object a line with the key "step" first, so that no row has to be kept
in memory or written twice. A line that a kill cut off is dropped when the file is opened.
"""

import json
from typing import Any

from llava_ray.data.storage import read_stored, write_tail
from llava_ray.errors import DataError
from llava_ray.images.reading import open_filesystem

_LONGEST_ROW = 2**16  # bytes


class StepFile:
    """The rows of one file: those on storage by number of bytes, those that are not yet there in memory."""

    def __init__(self, path: str) -> None:
        """Find the complete rows that earlier starts have written. Raises DataError for a damaged file."""
        self.path = path
        self.waiting: dict[int, str] = {}
        self.size = 0
        self.last = -1
        """The last step on storage; -1 without one."""
        self.changed = False
        """Whether there are bytes on storage behind the first ``size``."""
        self._measure(None)

    def add(self, step: int, row: dict[str, Any]) -> None:
        """Add a step's row, to be written with the next flush."""
        self.waiting[step] = json.dumps({"step": step} | row)

    def rewind(self, first_step: int) -> None:
        """Drop the rows from ``first_step`` on; those on storage go with the next flush."""
        for step in [step for step in self.waiting if step >= first_step]:
            del self.waiting[step]
        if self.last >= first_step:
            self._measure(first_step)

    def flush(self) -> None:
        """Append the rows that wait; return when they are on storage. Raises DataError where it cannot be written."""
        if not self.waiting and not self.changed:
            return
        text = "".join(f"{self.waiting[step]}\n" for step in sorted(self.waiting)).encode()
        self.changed = True  # also if this fails half way: the next attempt writes at the same place
        write_tail(self.path, self.size, text)
        self.size += len(text)
        self.last = max(self.waiting, default=self.last)
        self.waiting, self.changed = {}, False

    def read_last(self) -> dict[str, Any]:
        """Return the last row on storage without its step; {} where there is none."""
        if self.last < 0:
            return {}
        files, place = open_filesystem(self.path)
        with files.open(place, "rb") as stream:
            stream.seek(max(0, self.size - _LONGEST_ROW))
            row: dict[str, Any] = json.loads(stream.read(min(self.size, _LONGEST_ROW)).splitlines()[-1])
        del row["step"]
        return row

    def _measure(self, before: int | None) -> None:
        """Find where the rows of steps below ``before`` end, and the last of them; None for all rows."""
        self.size, self.last, self.changed = 0, -1, False
        files, place = open_filesystem(self.path)
        try:
            stream = files.open(place, "rb")
        except FileNotFoundError:
            return
        with stream:
            for number, line in enumerate(stream, 1):
                step = None if not line.endswith(b"\n") else self._step_of(line, number)
                if step is None or (before is not None and step >= before):
                    self.changed = True
                    return
                self.size, self.last = self.size + len(line), step

    def _step_of(self, line: bytes, number: int) -> int:
        """Return the step of a line. Raises DataError unless it begins as ``add`` writes it."""
        head, _, _ = line.partition(b",")
        key, _, step = head.rstrip(b"}\n").partition(b":")
        if key != b'{"step"' or not step.strip().isdigit() or int(step) <= self.last:
            raise DataError(
                f"{self.path}: line {number} is not the row of a step after {self.last}: {line[:60]!r}; restore the "
                "file from a backup, or start over with --run.restart True"
            )
        return int(step)


def read_rows(path: str) -> list[dict[str, Any]]:
    """Return the complete rows of a file, which may be written to meanwhile. Raises FileNotFoundError."""
    complete, _, _ = read_stored(path).rpartition(b"\n")
    return [json.loads(line) for line in complete.splitlines()]
