"""Descriptors of a plan's micro-batches: small tables of the examples in each, by rank and in stream order."""

from typing import Any

import numpy as np
import pyarrow as pa

from llava_ray.data.lengths import TokenLengths
from llava_ray.data.packing import NO_STEP, ROWS_PER_BLOCK
from llava_ray.data.plan import Plan, assign_to_ranks


def describe_micro_batches(
    plan: Plan, lengths: TokenLengths, steps: list[int], row_length: int, world_size: int
) -> list[pa.Table]:
    """Return the micro-batches of ``steps`` in stream order, a table for each read task.

    Within the stream, blocks of ROWS_PER_BLOCK rows go to rank 0, 1, …, 0, 1, … A task's blocks together hold about
    one shuffle window, so that it reads each of its shards once.
    """
    by_rank: list[list[dict[str, Any]]] = [[] for _ in range(world_size)]
    supervised = lengths.column("num_supervised")
    for step in steps:
        # The loss is divided by the supervised tokens of the whole step, so every micro-batch carries that sum: no rank
        # needs to ask the others for it.
        members = plan.step(step)
        dealt = assign_to_ranks(plan.num_tokens[members].tolist(), row_length, world_size)
        common = {"step": step, "num_supervised": int(supervised[members].sum()), "num_micro_batches": len(dealt[0])}
        for rank, rows in enumerate(dealt):
            by_rank[rank] += [common | {"rank": rank, "examples": members[row].tolist()} for row in rows]
    # Blocks are dealt to ranks in turn, which is exact only if all ranks have the same number of full blocks.
    for rank, micro_batches in enumerate(by_rank):
        filler = {"step": NO_STEP, "num_supervised": 0, "num_micro_batches": 0, "rank": rank, "examples": []}
        micro_batches += [filler] * (-len(micro_batches) % ROWS_PER_BLOCK)
    window = len(plan.num_tokens) * max(1, plan.shuffle_window) // len(np.unique(plan.shard))
    return _grouped(by_rank, lengths.table, window)


def _grouped(by_rank: list[list[dict[str, Any]]], table: pa.Table, window: int) -> list[pa.Table]:
    """Cut the ranks' rows into tables of whole block rounds holding about ``window`` examples each."""
    tables, rows, num_examples = [], [], 0
    for start in range(0, len(by_rank[0]), ROWS_PER_BLOCK):
        round_rows = [row for rank_rows in by_rank for row in rank_rows[start : start + ROWS_PER_BLOCK]]
        rows += round_rows
        num_examples += sum(len(row["examples"]) for row in round_rows)
        if num_examples >= window or start + ROWS_PER_BLOCK >= len(by_rank[0]):
            tables.append(_located(rows, table))
            rows, num_examples = [], 0
    return tables


def _located(rows: list[dict[str, Any]], table: pa.Table) -> pa.Table:
    """Replace example numbers by the location of their records: (shard, row, part)."""
    flat = np.asarray([i for row in rows for i in row["examples"]], np.int64)
    ends = np.cumsum([0] + [len(row["examples"]) for row in rows])
    places = table.select(["shard", "row", "part", "num_tokens"]).take(flat).combine_chunks()
    nested = {
        name: pa.ListArray.from_arrays(pa.array(ends, pa.int32()), places.column(name).combine_chunks())
        for name in places.column_names
    }
    scalars = ("step", "rank", "num_supervised", "num_micro_batches")
    return pa.table({name: pa.array([row[name] for row in rows], pa.int32()) for name in scalars} | nested)
