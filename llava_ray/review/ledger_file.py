"""The ledger: an append-only log of calls and their results, on the disk before they count.

A call (a key) is claimed → sent → done or failed. An attempt without result is ``returned``: "refused" (not billed),
"uncertain" (it may have been billed) or "wasted" (billed, without scores). A line is complete or absent; one process
writes at a time. ``done`` lines are a cache for every later run.

The ``sent`` row is on the disk *before* the request leaves: after a crash every request that may have been billed is
known, and counts with its largest cost. Written afterwards, a crash in between would lose a paid call, and the budget
would be exceeded unnoticed.
"""

import contextlib
import errno
import fcntl
import json
import os
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from llava_ray.errors import ConfigError, DataError

_State = Literal["new", "claimed", "sent", "done", "failed"]
_FINAL = ("done", "failed")
_COUNTED = (*_FINAL, "refused", "uncertain", "wasted")
_LOCK_RETRY_S = 0.1
BATCH = "batch/"
"""Prefix of a batch's owner: its calls outlive the job, and the next one polls them."""
_MAX_RECENT = 100_000
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass
class Entry:
    """The state of a call."""

    state: _State = "new"
    by: str = ""
    lease: str = ""
    """The last attempt that was sent."""
    dollars: float = 0.0
    """The upper bound of its cost."""


@dataclass
class Account:
    """The totals of a ledger: costs, tokens and numbers of attempts."""

    spent: float = 0.0
    sent: int = 0
    done: int = 0
    failed: int = 0
    refused: int = 0
    uncertain: int = 0
    wasted: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0


@dataclass(frozen=True)
class Sent:
    """An attempt, as a restarted limiter needs it."""

    lease: str
    judge: str
    time: float
    """Seconds since 1970."""
    tokens: float
    dollars: float


@dataclass(frozen=True)
class LedgerState:
    """The state that a restarted limiter restores."""

    spent: float
    recent: list[Sent]
    """Attempts that were sent within the window, finished or not."""
    under_way: list[Sent]
    """Attempts without a reply."""


@dataclass
class LedgerFile:
    """A ledger open for writing. Attempts of another ``session`` without a reply are uncertain."""

    path: Path
    session: str
    lock_wait_s: float = 0.0
    entries: dict[str, Entry] = field(default_factory=dict)
    account: Account = field(default_factory=Account)
    epoch: str = ""
    costs: dict[str, float] = field(default_factory=dict)
    """Costs of the last attempts, by lease."""
    batches: dict[str, str] = field(default_factory=dict)
    """Ids of batches at the endpoint, by owner."""
    recent: deque[Sent] = field(default_factory=lambda: deque(maxlen=_MAX_RECENT))
    """The last attempts, in order of sending."""
    end: int = 0
    """Bytes of complete lines."""

    def __post_init__(self) -> None:
        """Open and lock the file, truncate a partial last line, and load the rest. Raises ConfigError or DataError."""
        with translate_write_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            _check_ordinary(self.path)
            self.file = self.path.open("a+b", buffering=0)
        try:
            self._lock()
            last_session = self._replay()
        except BaseException:
            self.file.close()
            raise
        if last_session != self.session:
            self._take_over()

    def close(self) -> None:
        """Close the file and release its lock."""
        self.file.close()

    def claim(self, keys: Sequence[str], by: str) -> list[str]:
        """Assign calls to a reviewer; return those assigned, without finished ones and those of others."""
        claimed = []
        for key in keys:
            entry = self.entries.get(key)
            if entry is None or entry.state in ("new", "failed") or (entry.by == by and entry.state == "claimed"):
                claimed.append(key)
                self._write({"state": "claimed", "key": key, "by": by})
        return claimed

    def send(self, row: Mapping[str, Any]) -> str:
        """Record that a call is about to be sent; return the reason why it must not be, or "".

        ``row``: key, by, epoch (of the limiter that granted it), lease, judge, tokens, dollars. Idempotent. A stale
        epoch is rejected: that limiter was killed, and its successor does not know the lease.
        """
        entry = self.entries.get(row["key"])
        if entry is None or entry.by != row["by"]:
            return "not yours"
        if entry.state == "sent" and entry.lease == row["lease"]:
            return ""
        if row["epoch"] != self.epoch:
            return "stale"
        if entry.state != "claimed":
            return "not yours"
        self._write({"state": "sent", "time": round(time.time(), 3), **row})
        return ""

    def record_returned(self, row: Mapping[str, Any]) -> None:
        """Record an attempt without result: key, lease, outcome, reason, dollars."""
        entry = self.entries.get(row["key"])
        if entry is not None and entry.state == "sent" and entry.lease == row["lease"]:
            self._write({"state": "returned", **row})

    def release(self, keys: Sequence[str]) -> None:
        """Release claimed calls, so that others can claim them."""
        for key in keys:
            if self.entries[key].state == "claimed":
                self._write({"state": "claimed", "key": key, "by": ""})

    def finish(self, row: Mapping[str, Any]) -> None:
        """Record a call's end, once: state "done" (with reply, verdict, dollars, usage) or "failed" (with reason)."""
        entry = self.entries.get(row["key"])
        if entry is None or entry.state not in _FINAL:
            self._write(dict(row))

    def abandon(self, by: str, reason: str) -> dict[str, float]:
        """Release all calls of a dead reviewer; return the costs of its leases, the largest for uncertain ones.

        A reviewer that was killed between its last row here and its settlement has left a lease with the limiter.
        """
        lost = {lease: dollars for lease, dollars in self.costs.items() if lease.startswith(f"{by}/")}
        for key, entry in self.entries.items():
            if entry.by == by and entry.state in ("claimed", "sent"):
                if entry.state == "sent":
                    lost[entry.lease] = entry.dollars
                    self.record_returned(_uncertain(key, entry, reason))
                self._write({"state": "claimed", "key": key, "by": ""})
        return lost

    def name_batch(self, by: str, batch: str) -> None:
        """Record the endpoint's id of a batch."""
        self._write({"state": "batch", "by": by, "id": batch})
        self.sync()

    def in_batches(self) -> dict[str, list[str]]:
        """Return the calls in open batches, by owner."""
        found: dict[str, list[str]] = {}
        for key, entry in self.entries.items():
            if entry.state == "sent" and entry.by.startswith(BATCH):
                found.setdefault(entry.by, []).append(key)
        return found

    def register_limiter(self, epoch: str, window_s: float) -> LedgerState:
        """Accept leases of a new limiter only, and return the state that it restores."""
        self._write({"state": "limiter", "epoch": epoch})
        since = time.time() - window_s
        open_leases = {entry.lease: entry.dollars for entry in self.entries.values() if entry.state == "sent"}
        return LedgerState(
            self.account.spent,
            [sent for sent in self.recent if sent.time >= since],
            [sent for sent in self.recent if sent.lease in open_leases],
        )

    def sync(self) -> None:
        """Wait until all rows are on the disk. Raises ConfigError."""
        with translate_write_errors(self.path):
            os.fsync(self.file.fileno())

    def _lock(self) -> None:
        end = time.monotonic() + self.lock_wait_s
        while True:
            try:
                fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if time.monotonic() > end:
                    raise ConfigError(
                        f"another review is writing {self.path}: wait for it (it then costs nothing again), or choose "
                        "another --output or --ledger"
                    ) from error
                time.sleep(_LOCK_RETRY_S)
            else:
                return

    def _replay(self) -> str:
        session, self.end = "", 0
        with self.path.open("rb") as lines:
            for line in lines:
                if not line.endswith(b"\n"):
                    break
                self.end += len(line)
                row = _parse_line(line, self.path)
                session = row["session"] if row["state"] == "session" else session
                self._apply(row)
        with translate_write_errors(self.path):
            self.file.truncate(self.end)
        return session

    def _take_over(self) -> None:
        self._write({"state": "session", "session": self.session, "time": round(time.time(), 3)})
        for key, entry in self.entries.items():
            if entry.state == "sent" and entry.by.startswith(BATCH):
                continue
            if entry.state == "sent":
                self.record_returned(_uncertain(key, entry, "the job that sent it was stopped"))
            if entry.state == "claimed":
                self._write({"state": "claimed", "key": key, "by": ""})
        self.sync()

    def _write(self, row: Mapping[str, Any]) -> None:
        line = json.dumps(row, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"
        with translate_write_errors(self.path):
            try:
                rest = memoryview(line)
                while rest:
                    rest = rest[self.file.write(rest) :]
            except OSError:
                with contextlib.suppress(OSError):
                    self.file.truncate(self.end)  # remove the partial line
                raise
        self.end += len(line)
        self._apply(row)

    def _apply(self, row: Mapping[str, Any]) -> None:
        state = row["state"]
        if state == "limiter":
            self.epoch = row["epoch"]
        if state == "batch":
            self.batches[row["by"]] = row["id"]
        if "key" not in row:
            return
        entry = self.entries.setdefault(row["key"], Entry())
        if state == "claimed":
            entry.by, entry.state = row["by"], "claimed" if row["by"] else "new"
            return
        _add_to_account(self.account, row)
        if state == "sent":
            entry.state, entry.lease, entry.dollars = "sent", row["lease"], row["dollars"]
            self.recent.append(Sent(row["lease"], row["judge"], row["time"], row["tokens"], row["dollars"]))
            return
        entry.state = "claimed" if state == "returned" else state
        if "lease" in row:
            self.costs[row["lease"]] = row.get("dollars", 0.0)
            if len(self.costs) > _MAX_RECENT:
                del self.costs[next(iter(self.costs))]


def _add_to_account(account: Account, row: Mapping[str, Any]) -> None:
    """Add a row to the totals."""
    if row["state"] == "sent":
        account.sent += 1
    name = row.get("outcome") if row["state"] == "returned" else row["state"]
    if name not in _COUNTED:
        return
    setattr(account, name, getattr(account, name) + 1)
    account.spent += row.get("dollars", 0.0)
    usage = row.get("usage") or {}
    account.prompt_tokens += usage.get("prompt", 0)
    account.cached_tokens += usage.get("cached", 0)
    account.output_tokens += usage.get("output", 0)


def read_account(path: Path) -> Account:
    """Compute the totals of a ledger. Raises DataError."""
    account = Account()
    for row in read_ledger_rows(path):
        _add_to_account(account, row)
    return account


def read_final_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the done and failed rows of a ledger that may be in use. Raises DataError."""
    for row in read_ledger_rows(path):
        if row["state"] in _FINAL:
            yield row


def read_ledger_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yield a ledger's complete rows; none if there is no file. Raises ConfigError, DataError."""
    _check_ordinary(path)
    with contextlib.suppress(FileNotFoundError, NotADirectoryError), path.open("rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                yield _parse_line(line, path)


def _check_ordinary(path: Path) -> None:
    """Check that a ledger's path is not a folder or device. Raises ConfigError."""
    if path.exists() and not path.is_file():
        raise ConfigError(f"{path} is no ordinary file, and no ledger can be kept in it: choose another --ledger")


def _parse_line(line: bytes, path: Path) -> dict[str, Any]:
    """Parse a line. Raises DataError."""
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(
            f"{path} is damaged: {error} in {line[:60]!r}; remove that line; its call will be billed again"
        ) from error
    if not isinstance(row, dict) or "state" not in row:
        raise DataError(f"{path} is no ledger: it has a line {line[:60]!r}; choose another --ledger")
    return row


@contextlib.contextmanager
def translate_write_errors(path: Path) -> Iterator[None]:
    """Translate an OSError of writing a file to a ConfigError with the remedy."""
    try:
        yield
    except OSError as error:
        message = error.strerror or str(error)
        remedy = "free some space" if error.errno in _NO_ROOM else "check the folder"
        raise ConfigError(
            f"cannot write {path}: {message}; {remedy}, or choose another --output, and run the command again"
        ) from error


def _uncertain(key: str, entry: Entry, reason: str) -> dict[str, Any]:
    return {
        "key": key,
        "lease": entry.lease,
        "outcome": "uncertain",
        "reason": reason,
        "dollars": entry.dollars,
    }
