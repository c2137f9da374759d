"""Descriptors of a plan's micro-batches: small tables of the examples in each, by rank and in stream order.

The stream is cut into windows of whole steps. A window is known by its examples alone, so a run of any length starts
at any step at once; the task that reads a window also packs its rows and looks up where their records are.

Ray's own processes import this module to pass windows on, so it imports neither Ray nor torch.
"""

from collections.abc import Iterator
from typing import Any, TypedDict

import numpy as np
import pyarrow as pa
from jaxtyping import Float, Int

from llava_ray.data.packing import NO_STEP, ROWS_PER_BLOCK, STEP_TOTALS
from llava_ray.data.plan import Plan
from llava_ray.data.reference_file import ReferenceFiles
from llava_ray.data.row_assignment import SampleCost, assign_to_ranks
from llava_ray.data.token_lengths import TokenLengths

_COLUMNS = ("shard", "row", "part", "num_tokens", "num_supervised", "num_chosen", "num_images")
_PLACES = ("shard", "row", "part", "num_tokens")

# A window's last blocks may be part empty: with this many in each rank, a quarter at most.
_BLOCKS_PER_RANK = 2


class StepWindow(TypedDict):
    """Consecutive steps that one task reads: their number of examples each, and all examples as int32 bytes."""

    first_step: int
    sizes: list[int]
    examples: bytes


def plan_windows(plan: Plan, steps: range, row_length: int, world_size: int) -> Iterator[StepWindow]:
    """Yield the windows of consecutive ``steps``, each about one shuffle window, so that it reads each shard once."""
    length = _steps_per_window(plan, row_length, world_size)
    for first in range(steps.start, steps.stop, length):
        members = [plan.step(step) for step in range(first, min(first + length, steps.stop))]
        examples = np.concatenate(members).astype(np.int32)
        yield {"first_step": first, "sizes": [len(some) for some in members], "examples": examples.tobytes()}


def _steps_per_window(plan: Plan, row_length: int, world_size: int) -> int:
    """Return how many steps hold a shuffle window's examples, and for each rank a few blocks at least."""
    examples = len(plan.num_tokens) * max(1, plan.shuffle_window) // max(1, plan.num_shards)
    tokens = float(plan.num_tokens.mean()) * plan.global_batch_size
    rows_of_rank = max(1, round(tokens / row_length / world_size))
    return max(-(-examples // plan.global_batch_size), -(-_BLOCKS_PER_RANK * ROWS_PER_BLOCK // rows_of_rank), 1)


def describe_micro_batches(
    plan: Plan, lengths: TokenLengths, steps: range, row_length: int, world_size: int
) -> Iterator[pa.Table]:
    """Yield the micro-batches of ``steps`` in stream order, a table for each window."""
    for window in plan_windows(plan, steps, row_length, world_size):
        yield describe_window(window, lengths, row_length, world_size)


def describe_window(
    window: StepWindow,
    lengths: TokenLengths,
    row_length: int,
    world_size: int,
    cost: SampleCost | None = None,
    reference: ReferenceFiles | None = None,
) -> pa.Table:
    """Return the micro-batches of a window, in blocks of ROWS_PER_BLOCK rows of rank 0, 1, …, 0, 1, … by turns."""
    members = np.frombuffer(window["examples"], np.int32)
    examples = lengths.take(members, _COLUMNS)
    num_tokens, supervised, chosen, num_images = (
        examples.column(name).to_numpy() for name in ("num_tokens", "num_supervised", "num_chosen", "num_images")
    )
    costs = (cost or SampleCost()).estimate(num_tokens, num_images)
    by_rank: list[list[dict[str, Any]]] = [[] for _ in range(world_size)]
    first = 0
    for step, size in enumerate(window["sizes"], window["first_step"]):
        end = first + size
        dealt = assign_to_ranks(num_tokens[first:end].tolist(), row_length, world_size, costs[first:end].tolist())
        # The loss is divided by the terms of the whole step, so every micro-batch carries their number: no rank needs
        # to ask the others for it.
        common = {"step": step, **_count_terms(supervised[first:end], chosen[first:end])}
        common["num_micro_batches"] = len(dealt[0])
        for rank, rows in enumerate(dealt):
            by_rank[rank] += [common | {"rank": rank, "examples": [first + i for i in row]} for row in rows]
        first = end
    # Blocks are dealt to ranks in turn, which is exact only if every window gives all ranks the same number of them.
    for rank, micro_batches in enumerate(by_rank):
        totals = dict.fromkeys((*STEP_TOTALS, "num_micro_batches"), 0)
        filler = {"step": NO_STEP, **totals, "rank": rank, "examples": []}
        micro_batches += [filler] * (-len(micro_batches) % ROWS_PER_BLOCK)
    starts = range(0, len(by_rank[0]), ROWS_PER_BLOCK)
    ordered = [row for start in starts for rank_rows in by_rank for row in rank_rows[start : start + ROWS_PER_BLOCK]]
    return _located(ordered, examples, None if reference is None else reference.take(members))


def _count_terms(supervised: Int[np.ndarray, " b"], chosen: Int[np.ndarray, " b"]) -> dict[str, int]:
    """Return the totals of a step, by STEP_TOTALS."""
    is_pair = chosen > 0
    counts = (supervised[~is_pair].sum(), np.count_nonzero(is_pair), chosen.sum())
    return {name: int(count) for name, count in zip(STEP_TOTALS, counts, strict=True)}


def _located(rows: list[dict[str, Any]], examples: pa.Table, reference: Float[np.ndarray, "m 2"] | None) -> pa.Table:
    """Replace the numbers of a window's examples by the location of their records: (shard, row, part)."""
    flat = np.asarray([i for row in rows for i in row["examples"]], np.int64)
    ends = np.cumsum([0] + [len(row["examples"]) for row in rows])
    places = examples.select(_PLACES).take(flat).combine_chunks()
    nested = {
        name: pa.ListArray.from_arrays(pa.array(ends, pa.int32()), places.column(name).combine_chunks())
        for name in places.column_names
    }
    if reference is None:
        nested["reference"] = pa.array([[] for _ in rows], pa.list_(pa.float64()))
    else:
        of_rows = pa.array(reference[flat].ravel())
        nested["reference"] = pa.ListArray.from_arrays(pa.array(2 * ends, pa.int32()), of_rows)
    scalars = ("step", "rank", *STEP_TOTALS, "num_micro_batches")
    return pa.table({name: pa.array([row[name] for row in rows], pa.int32()) for name in scalars} | nested)
