"""The assignment of examples to steps: a pure function of (data, seed, token lengths).

A step is exactly ``global_batch_size`` examples whatever the world size; an epoch's last step holds the remainder.
Examples are packed into rows and assigned to ranks only within a step, so losses, ledgers and resumed runs agree for
any number of workers.
"""

import hashlib
import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from jaxtyping import Int, Int32


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

    @property
    def steps_per_epoch(self) -> int:
        """Count the steps of one pass; nothing is dropped or repeated."""
        return -(-len(self.num_tokens) // self.global_batch_size)

    @property
    def num_steps(self) -> int:
        """Count the steps of the run."""
        steps = self.steps_per_epoch * self.num_epochs
        return steps if self.max_steps is None else min(steps, self.max_steps)

    @cached_property
    def hash(self) -> str:
        """Return 16 hex digits that change whenever the examples of any step would."""
        digest = hashlib.sha256(repr((self.global_batch_size, self.seed, self.shuffle_window)).encode())
        digest.update(self.num_tokens.tobytes())
        digest.update(self.shard.tobytes())
        digest.update(self.order(0).tobytes())  # detects a numpy version that draws other permutations
        return digest.hexdigest()[:16]

    def order(self, epoch: int) -> Int[np.ndarray, " n"]:
        """Return the epoch's permutation: shards shuffled, then the examples of each window of shards.

        With windows, every shard is read once per epoch. A window of 0 disables shuffling, for a curriculum.
        """
        if self.shuffle_window == 0:
            return np.arange(len(self.shard))
        # Seeded by (seed, epoch), not one running generator: any epoch's order can be computed alone, so a run can
        # resume at any step and every process computes the same plan.
        draw = np.random.default_rng([self.seed, epoch])
        shards = draw.permutation(np.unique(self.shard))
        windows = [shards[i : i + self.shuffle_window] for i in range(0, len(shards), self.shuffle_window)]
        members = (np.flatnonzero(np.isin(self.shard, window)) for window in windows)
        return np.concatenate([draw.permutation(indices) for indices in members])

    def step(self, number: int) -> Int[np.ndarray, " b"]:
        """Return the examples of step ``number``, counted from 0."""
        epoch, within = divmod(number, self.steps_per_epoch)
        return _order(self, epoch)[within * self.global_batch_size : (within + 1) * self.global_batch_size]


@lru_cache(maxsize=2)
def _order(plan: Plan, epoch: int) -> Int[np.ndarray, " n"]:
    return plan.order(epoch)


def assign_to_ranks(num_tokens: Sequence[int], row_length: int, world_size: int) -> list[list[list[int]]]:
    """Pack one step into rows and assign them to ranks: ``result[rank][micro_batch]`` is a row, a list of positions.

    Every rank gets the same number of rows, because collectives need equal numbers of forward passes, and about the
    same number of tokens; with fewer examples than ranks some rows are empty.
    """
    rows = pack(num_tokens, row_length)
    rows += [[] for _ in range(-len(rows) % world_size)]
    # First fit gives the least number of rows but leaves the last ones short. Balanced rows of the same number finish
    # together on all ranks; they are used unless one overflows.
    even = _balance_rows(num_tokens, len(rows))
    if all(count_row_tokens(num_tokens, row) <= row_length for row in even):
        rows = even
    rows.sort(key=lambda row: -count_row_tokens(num_tokens, row))
    dealt: list[list[list[int]]] = [[] for _ in range(world_size)]
    loads = [0] * world_size
    for row in rows:
        free = [rank for rank in range(world_size) if len(dealt[rank]) < len(rows) // world_size]
        rank = min(free, key=lambda rank: (loads[rank], rank))
        dealt[rank].append(sorted(row))
        loads[rank] += count_row_tokens(num_tokens, row)
    return dealt


def pack(num_tokens: Sequence[int], row_length: int) -> list[list[int]]:
    """Pack into few rows of at most ``row_length`` tokens, first fit, longest first; a row is a list of positions."""
    rows: list[list[int]] = []
    room: list[int] = []
    for position in _longest_first(num_tokens):
        length = num_tokens[position]
        if length > row_length:
            raise ValueError(f"an example of {length} tokens does not fit into a row of {row_length}")
        fitting = next((row for row, left in enumerate(room) if length <= left), None)
        if fitting is None:
            rows.append([position])
            room.append(row_length - length)
        else:
            rows[fitting].append(position)
            room[fitting] -= length
    return rows


def _balance_rows(num_tokens: Sequence[int], num_rows: int) -> list[list[int]]:
    """Distribute examples over exactly ``num_rows`` rows: longest first, each to the row with the fewest tokens."""
    rows: list[list[int]] = [[] for _ in range(num_rows)]
    loads = [(0, row) for row in range(num_rows)]
    for position in _longest_first(num_tokens):
        tokens, row = heapq.heappop(loads)
        rows[row].append(position)
        heapq.heappush(loads, (tokens + num_tokens[position], row))
    return rows


def _longest_first(num_tokens: Sequence[int]) -> list[int]:
    """Sort the positions by length, longest first; equal ones stay in order, so that the plan is deterministic."""
    return sorted(range(len(num_tokens)), key=lambda position: (-num_tokens[position], position))


def count_row_tokens(num_tokens: Sequence[int], row: Sequence[int]) -> int:
    """Count a row's tokens."""
    return sum(num_tokens[position] for position in row)
