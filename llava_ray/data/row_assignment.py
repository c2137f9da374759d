"""The assignment of a step's examples to rows, and of rows to ranks.

Rows depend on lengths alone, and are the same for any model; which rank computes which row depends on what they cost.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int


@dataclass(frozen=True)
class SampleCost:
    """The time that training on a sample takes, in any unit: for each token, each pair of tokens, and each image.

    Pairs are of a token and an earlier one, which attention compares.
    """

    token: float = 1.0
    pair: float = 0.0
    image: float = 0.0

    def estimate(self, num_tokens: Int[np.ndarray, " n"], num_images: Int[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
        """Return the cost of each sample."""
        tokens = num_tokens.astype(np.float64)
        return self.token * tokens + self.pair * tokens**2 / 2 + self.image * num_images


def assign_to_ranks(
    num_tokens: Sequence[int], row_length: int, world_size: int, costs: Sequence[float] | None = None
) -> list[list[list[int]]]:
    """Pack one step into rows and assign them to ranks: ``result[rank][micro_batch]`` is a row, a list of positions.

    Every rank gets the same number of rows, because collectives need equal numbers of forward passes, and rows of
    about the same ``costs`` (of each example; default: its tokens), in each micro-batch and in all. With fewer examples
    than ranks some rows are empty.
    """
    rows = pack(num_tokens, row_length)
    rows += [[] for _ in range(-len(rows) % world_size)]
    # First fit gives the least number of rows but leaves the last ones short. Balanced rows of the same number finish
    # together on all ranks; they are used unless one overflows.
    even = _balance_rows(num_tokens, len(rows))
    if all(count_row_tokens(num_tokens, row) <= row_length for row in even):
        rows = even
    # How samples make up rows does not depend on costs: what a sample's neighbours are would change with the model.
    rows.sort(key=lambda row: -count_row_tokens(num_tokens, row))
    if world_size == 1:
        return [[sorted(row) for row in rows]]
    return _deal_rows(rows, num_tokens if costs is None else costs, world_size)


def _deal_rows(rows: list[list[int]], costs: Sequence[float], world_size: int) -> list[list[list[int]]]:
    """Deal rows in rounds, most costly first: in each round the rank with the least so far gets the most costly row.

    The rows of a round run at the same time, and where collectives join each micro-batch (ZeRO 3) ranks wait for the
    slowest of them.
    """
    weighed = sorted(((sum(costs[position] for position in row), row) for row in rows), key=lambda pair: -pair[0])
    dealt: list[list[list[int]]] = [[] for _ in range(world_size)]
    loads = [0.0] * world_size
    for start in range(0, len(weighed), world_size):
        ranks = sorted(range(world_size), key=lambda rank: (loads[rank], rank))
        for rank, (cost, row) in zip(ranks, weighed[start : start + world_size], strict=True):
            dealt[rank].append(sorted(row))
            loads[rank] += cost
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
