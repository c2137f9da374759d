"""The ledger as an actor: one writer for the whole job, which returns when its rows are on the disk.

It runs on the driver's node, beside the file. If it is killed, it restarts and reads the file: no confirmed row is
lost.
"""

import asyncio
import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from llava_ray.review.actors import get_result
from llava_ray.review.ledger_file import LedgerFile, LedgerState

_LOCK_WAIT_S = 15.0  # an actor of a killed job may hold the lock for a moment


class LedgerActor:
    """A LedgerFile with grouped fsyncs; runs as a Ray actor (see ``open_ledger``)."""

    def __init__(self, path: str, session: str) -> None:
        """Open the file. Raises ConfigError if another job is writing it."""
        self.file = LedgerFile(Path(path), session, _LOCK_WAIT_S)
        self.written = self.synced = 0
        self.syncing: asyncio.Task[None] | None = None

    async def claim(self, keys: Sequence[str], by: str) -> list[str]:
        """Claim calls; see LedgerFile.claim. Without fsync, because a lost claim costs nothing."""
        return self.file.claim(keys, by)

    async def send(self, rows: Sequence[Mapping[str, Any]]) -> list[str]:
        """Record attempts before they are sent; see LedgerFile.send."""
        refusals = [self.file.send(row) for row in rows]
        await self._durable()
        return refusals

    async def record_returned(self, rows: Sequence[Mapping[str, Any]]) -> list[None]:
        """Record attempts without result; see LedgerFile.record_returned."""
        for row in rows:
            self.file.record_returned(row)
        await self._durable()
        return [None] * len(rows)

    async def finish(self, rows: Sequence[Mapping[str, Any]]) -> list[None]:
        """Record the end of calls; see LedgerFile.finish."""
        for row in rows:
            self.file.finish(row)
        await self._durable()
        return [None] * len(rows)

    async def abandon(self, by: str, reason: str) -> dict[str, float]:
        """Release the calls of a dead reviewer; see LedgerFile.abandon."""
        lost = self.file.abandon(by, reason)
        await self._durable()
        return lost

    async def register_limiter(self, epoch: str, window_s: float) -> LedgerState:
        """Register a new limiter; see LedgerFile.register_limiter."""
        return self.file.register_limiter(epoch, window_s)

    async def states(self, keys: Sequence[str]) -> list[str]:
        """Return the states of calls."""
        entries = self.file.entries
        return [entries[key].state if key in entries else "new" for key in keys]

    async def account(self) -> dict[str, float]:
        """Return the totals of the ledger."""
        return asdict(self.file.account)

    async def close(self) -> None:
        """Sync the file and release its lock."""
        try:
            await self._durable()
        finally:
            self.file.close()

    async def _durable(self) -> None:
        """Wait until all written rows are on the disk; concurrent callers share one fsync."""
        self.written += 1
        mine = self.written
        while self.synced < mine:
            if self.syncing is None:
                self.syncing = asyncio.create_task(self._sync())
            await self.syncing

    async def _sync(self) -> None:
        try:
            upto = self.written
            await asyncio.to_thread(self.file.sync)
            self.synced = upto
        finally:
            self.syncing = None


def close_ledger(ledger: ActorHandle) -> None:
    """Close the file and kill the actor. Raises ConfigError if the file cannot be written."""
    try:
        with contextlib.suppress(RayActorError):
            get_result(ledger.close.remote())
    finally:
        ray.kill(ledger)


def open_ledger(path: Path, session: str) -> ActorHandle:
    """Start the ledger on the driver's node. Raises ConfigError if another job is writing it."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    kind = ray.remote(LedgerActor).options(num_cpus=0, max_restarts=-1, max_task_retries=0, scheduling_strategy=here)
    ledger = kind.remote(str(path.resolve()), session)
    try:
        ray.get(ledger.account.remote())
    except RayActorError:
        # Ray does not pass on a constructor's error: open the file here to raise it.
        LedgerFile(path.resolve(), session).close()
        raise
    return ledger
