"""The stream's layout: blocks of one rank, every example once, each at the place its rank expects."""

import numpy as np
import pyarrow as pa
import pytest
from commands import imported

from llava_ray.data.descriptors import describe_micro_batches
from llava_ray.data.lengths import SCHEMA, TokenLengths
from llava_ray.data.packing import NO_STEP, ROWS_PER_BLOCK
from llava_ray.data.plan import Plan


def make(num_samples: int = 200) -> tuple[Plan, TokenLengths]:
    """Return a plan over ten shards, and its lengths."""
    draw = np.random.default_rng(0)
    tokens = draw.integers(20, 200, num_samples).astype(np.int32)
    shard = np.repeat(np.arange(10), num_samples // 10).astype(np.int32)
    row = np.tile(np.arange(num_samples // 10), 10)
    zero, one = np.zeros(num_samples, int), np.ones(num_samples, int)
    columns = [shard, row, zero, [str(i) for i in range(num_samples)], tokens, one, one, zero.astype(bool)]
    table = pa.table([pa.array(c, field.type) for c, field in zip(columns, SCHEMA, strict=True)], schema=SCHEMA)
    return Plan(tokens, shard, 16, 2, seed=1, shuffle_window=3), TokenLengths(table, 0, "")


def rows_of(tables: list[pa.Table]) -> list[dict]:
    return [row for table in tables for row in table.to_pylist()]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_blocks_belong_to_one_rank_by_turns(world_size):
    plan, lengths = make()
    rows = rows_of(describe_micro_batches(plan, lengths, list(range(plan.num_steps)), 256, world_size))
    blocks = [rows[i : i + ROWS_PER_BLOCK] for i in range(0, len(rows), ROWS_PER_BLOCK)]
    assert [{row["rank"] for row in block} for block in blocks] == [{i % world_size} for i in range(len(blocks))]
    assert len(rows) % (world_size * ROWS_PER_BLOCK) == 0


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_each_rank_meets_its_steps_in_order_and_every_example_comes_once_an_epoch(world_size):
    plan, lengths = make()
    rows = rows_of(describe_micro_batches(plan, lengths, list(range(plan.steps_per_epoch)), 256, world_size))
    for rank in range(world_size):
        steps = [row["step"] for row in rows if row["rank"] == rank and row["step"] != NO_STEP]
        assert steps == sorted(steps)
    places = [place for row in rows for place in zip(row["shard"], row["row"], strict=True)]
    assert sorted(places) == sorted((shard, row) for shard in range(10) for row in range(20))


def test_starting_later_gives_the_same_steps():
    plan, lengths = make()
    whole = rows_of(describe_micro_batches(plan, lengths, list(range(plan.num_steps)), 256, 2))
    late = rows_of(describe_micro_batches(plan, lengths, list(range(9, plan.num_steps)), 256, 2))

    def wanted(rows: list[dict]) -> list[dict]:
        return [row for rank in range(2) for row in rows if row["rank"] == rank and row["step"] >= 9]

    assert wanted(late) == wanted(whole)


@pytest.mark.slow
def test_what_rays_own_processes_import_is_light():
    # The controller and the data manager of a run only pass these on, decoding needs no more: seconds on each start.
    modules = (
        "data.stream",
        "generate.questions",
        "train.runs",
        "train.settings",
        "train.run_recorder",
        "train.worker",
    )
    found = imported(*(f"llava_ray.{module}" for module in modules))
    assert not {"torch", "transformers", "mlflow"} & found
