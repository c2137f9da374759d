"""An append-only file of answers: one JSON line each, on the disk before the next batch, each question once.

A run that was killed resumes after the last complete line. The lines are in LLaVA's format, so its scripts read
them.
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
    """An answers file with a lock, so that one run writes it at a time."""

    def __init__(self, path: Path, setting: str = "--run.name") -> None:
        """Store the path, and the setting that names another one; ``with`` opens the file."""
        self.path = path
        self.setting = setting

    def __enter__(self) -> Self:
        """Open and lock the file, and truncate an incomplete last line. Raises ConfigError if it is locked."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.file = self.path.open("a+b")
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self.file.close()
            raise ConfigError(
                f"another run is writing {self.path}: wait for it, or choose another {self.setting}"
            ) from error
        self.file.seek(0)
        content = self.file.read()
        self.file.truncate(content.rfind(b"\n") + 1)
        self.rows = {str(row["question_id"]): row for row in map(json.loads, self._whole_lines(content))}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the file and release its lock."""
        self.file.close()

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append rows (with ``question_id``) whose ids are new, and wait until they are on the disk."""
        new_rows = [row for row in rows if str(row["question_id"]) not in self.rows]
        self.file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in new_rows).encode())
        self.file.flush()
        os.fsync(self.file.fileno())
        self.rows.update({str(row["question_id"]): dict(row) for row in new_rows})

    def arrange(self, ids: Sequence[str]) -> None:
        """Sort the lines into the order of the questions, so that an interrupted run leaves the same file.

        Answers to other questions (of a run with more of them) stay at the end. Call it last: the lock is on the file
        that this replaces.
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
