"""The ledger as an actor: one writer for the whole job, answering when what it was told is on the disk.

It lives on the driver's node, beside the file. Killed, it starts again and reads the file: nothing
that was answered is lost.
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

from llava_ray.review.actors import heard
from llava_ray.review.ledger_file import LedgerFile, LedgerState

_LOCK_WAIT_S = 15.0  # an actor of a killed job may live on for a moment


class LedgerActor:
    """A LedgerFile whose writes wait for the disk together; run as a Ray actor (see ``open_ledger``)."""

    def __init__(self, path: str, session: str) -> None:
        """Open the file. Raises ConfigError if another job is writing it."""
        self.file = LedgerFile(Path(path), session, _LOCK_WAIT_S)
        self.written = self.synced = 0
        self.syncing: asyncio.Task[None] | None = None

    async def claim(self, keys: Sequence[str], by: str) -> list[str]:
        """See LedgerFile.claim. A claim that is lost costs nothing: the disk is not waited for."""
        return self.file.claim(keys, by)

    async def send(self, rows: Sequence[Mapping[str, Any]]) -> list[str]:
        """See LedgerFile.send."""
        refusals = [self.file.send(row) for row in rows]
        await self._durable()
        return refusals

    async def give_back(self, rows: Sequence[Mapping[str, Any]]) -> list[None]:
        """See LedgerFile.give_back."""
        for row in rows:
            self.file.give_back(row)
        await self._durable()
        return [None] * len(rows)

    async def finish(self, rows: Sequence[Mapping[str, Any]]) -> list[None]:
        """See LedgerFile.finish."""
        for row in rows:
            self.file.finish(row)
        await self._durable()
        return [None] * len(rows)

    async def abandon(self, by: str, reason: str) -> dict[str, float]:
        """See LedgerFile.abandon."""
        lost = self.file.abandon(by, reason)
        await self._durable()
        return lost

    async def adopt(self, epoch: str, window_s: float) -> LedgerState:
        """See LedgerFile.adopt."""
        return self.file.adopt(epoch, window_s)

    async def states(self, keys: Sequence[str]) -> list[str]:
        """Return where calls stand."""
        entries = self.file.entries
        return [entries[key].state if key in entries else "new" for key in keys]

    async def account(self) -> dict[str, float]:
        """Return the sums over everything in the ledger."""
        return asdict(self.file.account)

    async def close(self) -> None:
        """Write everything and let others write."""
        try:
            await self._durable()
        finally:
            self.file.close()

    async def _durable(self) -> None:
        """Wait for the disk; whoever comes while it is busy waits for the next time, together."""
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
    """Let others write the file, and end the actor. Raises ConfigError where the file cannot be written."""
    try:
        with contextlib.suppress(RayActorError):
            heard(ledger.close.remote())
    finally:
        ray.kill(ledger)


def open_ledger(path: Path, session: str) -> ActorHandle:
    """Start the ledger beside the driver. Raises ConfigError if another job is writing it."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    kind = ray.remote(LedgerActor).options(num_cpus=0, max_restarts=-1, max_task_retries=0, scheduling_strategy=here)
    ledger = kind.remote(str(path.resolve()), session)
    try:
        ray.get(ledger.account.remote())
    except RayActorError:
        # A constructor's error is not told as such: look for ourselves.
        LedgerFile(path.resolve(), session).close()
        raise
    return ledger
