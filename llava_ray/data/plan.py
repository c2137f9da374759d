"""The assignment of examples to steps: a pure function of (data, seed, token lengths).

A step is exactly ``global_batch_size`` examples whatever the world size; an epoch's last step holds the remainder.
Examples are packed into rows and assigned to ranks only within a step, so losses, ledgers and resumed runs agree for
any number of workers.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from jaxtyping import Int, Int32


@dataclass(frozen=True, eq=False)
class PlanSource:
    """The examples of one prepared folder; ``shard`` is the shard of each one."""

    num_tokens: Int32[np.ndarray, " n"]
    shard: Int32[np.ndarray, " n"]
    num_shards: int | None = None
    """Shards of the folder; default: up to the last one that has examples."""


@dataclass(frozen=True, eq=False)
class Plan:
    """The order of n examples through all epochs; ``shard`` is the shard of each one."""

    num_tokens: Int32[np.ndarray, " n"]
    shard: Int32[np.ndarray, " n"]
    global_batch_size: int
    num_epochs: int
    seed: int
    shuffle_window: int
    max_steps: int | None = None
    draws: tuple[tuple[int, int], ...] = ()
    """For each source its number of examples and how many of them an epoch draws; () draws each example once."""

    @classmethod
    def of_sources(cls, sources: Sequence[tuple[PlanSource, int]], **settings: Any) -> "Plan":
        """Build the plan of several sources, each with the number of examples that an epoch draws from it.

        A source that is drawn more often than it has examples repeats them. Examples and shards are numbered through
        all sources.
        """
        shards, first = [], 0
        for source, number in sources:
            if number and not len(source.shard):
                raise ValueError(f"an epoch draws {number} examples from a source that has none")
            shards.append(source.shard + np.int32(first))
            first += int(source.shard.max(initial=-1)) + 1 if source.num_shards is None else source.num_shards
        draws = tuple((len(source.shard), number) for source, number in sources)
        return cls(
            np.concatenate([source.num_tokens for source, _ in sources]),
            np.concatenate(shards),
            draws=() if len(draws) == 1 and draws[0][0] == draws[0][1] else draws,
            **settings,
        )

    @property
    def examples_per_epoch(self) -> int:
        """Count the examples of one epoch, repeated ones as often as they are drawn."""
        return sum(number for _, number in self.draws) if self.draws else len(self.num_tokens)

    @cached_property
    def num_shards(self) -> int:
        """Count the shards."""
        return len(_ShardMembers(self.shard).names)

    @property
    def steps_per_epoch(self) -> int:
        """Count the steps of one pass; nothing is dropped or repeated."""
        return -(-self.examples_per_epoch // self.global_batch_size)

    @property
    def num_steps(self) -> int:
        """Count the steps of the run."""
        steps = self.steps_per_epoch * self.num_epochs
        return steps if self.max_steps is None else min(steps, self.max_steps)

    @cached_property
    def hash(self) -> str:
        """Return 16 hex digits that change whenever the examples of any step would."""
        digest = hashlib.sha256(repr((self.global_batch_size, self.seed, self.shuffle_window)).encode())
        # As they stand in memory: 100 million examples are not copied to be hashed.
        digest.update(np.ascontiguousarray(self.num_tokens).data)
        digest.update(np.ascontiguousarray(self.shard).data)
        if self.draws:
            digest.update(repr(self.draws).encode())
        digest.update(self.order(0).data)  # detects a numpy version that draws other permutations
        return digest.hexdigest()[:16]

    def order(self, epoch: int) -> Int[np.ndarray, " n"]:
        """Return the epoch's order: shards shuffled, then the examples of each window of shards.

        With windows, every shard is read once per epoch. A window of 0 disables shuffling, for a curriculum. Several
        sources are drawn from evenly, each at its share of the epoch: whole passes and, of the last one, its beginning,
        which is another part of the source in each epoch.
        """
        if not self.draws:
            return self._pass(0, len(self.shard), [self.seed, epoch])
        if self.shuffle_window == 0:
            return self._interleave([_go_on(size, draws, epoch) for size, draws in self.draws])
        orders, first = [], 0
        for number, (size, draws) in enumerate(self.draws):
            # A source's first pass is drawn as it would be alone, the others by numbers of their own.
            repeats = range(-(-draws // size) if size else 0)
            seeds = [[self.seed, epoch, *([number, again] if number or again else [])] for again in repeats]
            passes = [self._pass(first, first + size, seed) for seed in seeds]
            orders.append(np.concatenate([np.empty(0, np.int64), *passes])[:draws] - first)
            first += size
        return self._interleave(orders)

    def _interleave(self, orders: Sequence[Int[np.ndarray, " d"]]) -> Int[np.ndarray, " n"]:
        """Merge each source's draws, numbered within it, evenly into one order of all examples."""
        firsts = np.cumsum([0, *(size for size, _ in self.draws)])
        ranks = [(np.arange(len(order)) + 0.5) / max(len(order), 1) for order in orders]
        merged = np.concatenate([order + first for order, first in zip(orders, firsts, strict=False)])
        return merged[np.argsort(np.concatenate(ranks), kind="stable")]

    def _pass(self, first: int, end: int, seed: list[int]) -> Int[np.ndarray, " m"]:
        """Return one pass over the examples ``first`` to ``end``, in the order that ``seed`` draws."""
        if self.shuffle_window == 0:
            return np.arange(first, end)
        # Seeded by (seed, epoch), not one running generator: any epoch's order can be computed alone, so a run can
        # resume at any step and every process computes the same plan.
        draw = np.random.default_rng(seed)
        members = _ShardMembers(self.shard[first:end])
        shards = draw.permutation(members.names)
        order, filled = np.empty(end - first, np.int64), 0
        for start in range(0, len(shards), self.shuffle_window):
            examples = draw.permutation(members.of(shards[start : start + self.shuffle_window]))
            order[filled : filled + len(examples)] = examples
            filled += len(examples)
        return order + first if first else order

    def step(self, number: int) -> Int[np.ndarray, " b"]:
        """Return the examples of step ``number``, counted from 0."""
        epoch, within = divmod(number, self.steps_per_epoch)
        return _order(self, epoch)[within * self.global_batch_size : (within + 1) * self.global_batch_size]


class _ShardMembers:
    """The examples of each shard, found by offsets: the time to list them all is linear in their number."""

    def __init__(self, shard: Int32[np.ndarray, " n"]) -> None:
        """Find where each shard's examples stand; they are sorted by shard unless someone built the plan otherwise."""
        self.positions = None
        if np.any(shard[1:] < shard[:-1]):
            self.positions = np.argsort(shard, kind="stable")
            shard = shard[self.positions]
        self.starts = np.flatnonzero(np.concatenate([[True], shard[1:] != shard[:-1]])[: len(shard)])
        self.ends = np.append(self.starts[1:], len(shard))[: len(self.starts)]
        self.names = shard[self.starts]

    def of(self, shards: Int[np.ndarray, " s"]) -> Int[np.ndarray, " m"]:
        """Return the examples of ``shards``, in ascending order."""
        places = np.searchsorted(self.names, np.sort(shards))
        ranges = [np.arange(self.starts[place], self.ends[place]) for place in places]
        found = np.concatenate(ranges)
        return found if self.positions is None else np.sort(self.positions[found])


def _go_on(size: int, draws: int, epoch: int) -> Int[np.ndarray, " d"]:
    """Return a source's draws in the order of its file: an epoch goes on where the one before it ended."""
    return (np.arange(draws) + epoch * draws) % max(size, 1)


@lru_cache(maxsize=1)  # steps come in order; at 100 million examples an epoch's order takes 0.8 GB
def _order(plan: Plan, epoch: int) -> Int[np.ndarray, " n"]:
    return plan.order(epoch)
