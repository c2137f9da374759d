"""A file of rows by step that only grows: new rows are appended, and rows of steps that are repeated are cut off.

Rows stand in the order of their steps, one JSON object a line with the key "step" first, so that no row has to be kept
in memory or written twice. A line that a kill cut off is dropped when the file is opened.
"""

import json
import math
from collections.abc import Mapping
from typing import Any

from llava_ray.data.storage import read_stored, write_tail
from llava_ray.errors import DataError
from llava_ray.images.reading import open_filesystem

_LONGEST_ROW = 2**16  # bytes


class StepFile:
    """The rows of one file: those on storage by number of bytes, those that are not yet there in memory."""

    def __init__(self, path: str) -> None:
        """Find the complete rows that earlier starts have written. Raises DataError for a damaged file.

        Reads the whole file, once a start: an hour's damage must not be found after a day's training.
        """
        self.path = path
        self.waiting: dict[int, str] = {}
        self.size = 0
        self.last = -1
        """The last step on storage; -1 without one."""
        self.changed = False
        """Whether there are bytes on storage behind the first ``size``."""
        self._measure()

    def add(self, step: int, row: dict[str, Any]) -> None:
        """Add a step's row, to be written with the next flush; a number that is not finite becomes null.

        A skipped step has such a loss, and JSON knows no NaN.
        """
        known = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()
        }
        self.waiting[step] = json.dumps({"step": step} | known, allow_nan=False)

    def rewind(self, first_step: int) -> None:
        """Drop the rows from ``first_step`` on; those on storage go with the next flush."""
        for step in [step for step in self.waiting if step >= first_step]:
            del self.waiting[step]
        if self.last >= first_step:
            self._cut(first_step)

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

    def _measure(self) -> None:
        """Find where the complete rows end, and the last of them."""
        files, place = open_filesystem(self.path)
        try:
            stream = files.open(place, "rb")
        except FileNotFoundError:
            return
        with stream:
            for number, line in enumerate(stream, 1):
                if not line.endswith(b"\n"):
                    self.changed = True
                    return
                step = _step_of(line)
                if step is None or step <= self.last:
                    raise DataError(
                        f"{self.path}: line {number} is not the row of a step after {self.last}: {line[:60]!r}; "
                        "restore the file from a backup, or start over with --run.restart True"
                    )
                self.size, self.last = self.size + len(line), step

    def _cut(self, before: int) -> None:
        """Find where the rows of steps below ``before`` end, from the end of the file: few are ever repeated."""
        files, place = open_filesystem(self.path)
        length = _LONGEST_ROW
        with files.open(place, "rb") as stream:
            while True:
                start = max(0, self.size - length)
                stream.seek(start)
                lines = stream.read(self.size - start).splitlines(keepends=True)
                if start:
                    start += len(lines.pop(0))  # which may begin in the middle of a row
                steps = [_step_of(line) for line in lines]
                kept = [step for step in steps if step is not None and step < before]
                if kept or not start:
                    break
                length *= 4
        self.size = start + sum(len(line) for line in lines[: len(kept)])
        self.last = kept[-1] if kept else -1
        self.changed = True


def _step_of(line: bytes) -> int | None:
    """Return the step of a line; None unless it begins as ``StepFile.add`` writes it."""
    head, _, _ = line.partition(b",")
    key, _, step = head.rstrip(b"}\n").partition(b":")
    return int(step) if key == b'{"step"' and step.strip().isdigit() else None


def read_rows(path: str) -> list[dict[str, Any]]:
    """Return the complete rows of a file, which may be written to meanwhile. Raises FileNotFoundError."""
    complete, _, _ = read_stored(path).rpartition(b"\n")
    return [json.loads(line) for line in complete.splitlines()]


def finite(metrics: Mapping[str, float | None]) -> dict[str, float]:
    """Return the metrics that are finite numbers: a skipped step has a loss that no chart or average can hold."""
    return {key: value for key, value in metrics.items() if value is not None and math.isfinite(value)}


def as_number(value: float | None) -> float:
    """Return a number of a row: NaN for the null that ``StepFile.add`` writes for one that is not finite."""
    return math.nan if value is None else value
