"""Answers kept as they come: one JSON line each, on the disk before the next batch, each question once.

A run that was killed goes on from the lines that are whole. The lines are LLaVA's own form, so any of its scripts
reads them.
"""

import fcntl
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from llava_ray.errors import ConfigError


class AnswersFile:
    """An answers file that one run writes at a time."""

    def __init__(self, path: Path) -> None:
        """Name the file; it is opened by ``with``."""
        self.path = path

    def __enter__(self) -> Self:
        """Open the file, cut a line that was not finished. Raises ConfigError if another run is writing it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.file = self.path.open("a+b")
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self.file.close()
            raise ConfigError(
                f"another run is writing {self.path}: wait for it, or choose another --run.name"
            ) from error
        self.file.seek(0)
        content = self.file.read()
        self.file.truncate(content.rfind(b"\n") + 1)
        self.rows = {str(row["question_id"]): row for row in map(json.loads, self._whole_lines(content))}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the file and let others write it."""
        self.file.close()

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write rows (with ``question_id``) whose ids are new, and wait until they are on the disk."""
        fresh = [row for row in rows if str(row["question_id"]) not in self.rows]
        self.file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in fresh).encode())
        self.file.flush()
        os.fsync(self.file.fileno())
        self.rows.update({str(row["question_id"]): dict(row) for row in fresh})

    def arrange(self, ids: Sequence[str]) -> None:
        """Put the lines into the order of the questions, so that a run that was disturbed leaves the same file.

        Answers to other questions (of a run that asked more) stay, at the end. The last thing to do before closing: the
        lock is on the file that this replaces.
        """
        wanted = dict.fromkeys(ids)
        order = [name for name in ids if name in self.rows] + [name for name in self.rows if name not in wanted]
        content = "".join(json.dumps(self.rows[name], ensure_ascii=False) + "\n" for name in order)
        temporary = self.path.with_name(f".{self.path.name}.arranged")
        with temporary.open("wb") as file:
            file.write(content.encode())
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.path)

    @staticmethod
    def _whole_lines(content: bytes) -> list[bytes]:
        return [line for line in content[: content.rfind(b"\n") + 1].split(b"\n") if line.strip()]
