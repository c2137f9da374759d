"""The stream's layout: blocks of one rank, every example once, each at the place its rank expects."""

import pickle
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from commands import imported

from llava_ray.data.descriptors import describe_micro_batches, describe_window, plan_windows
from llava_ray.data.packing import NO_STEP, ROWS_PER_BLOCK
from llava_ray.data.plan import Plan
from llava_ray.data.token_lengths import LENGTHS_FILE, SCHEMA, TokenLengths
from llava_ray.errors import DataError


@pytest.fixture
def planned(tmp_path: Path) -> tuple[Plan, TokenLengths]:
    """Return a plan over ten shards, and its lengths."""
    num_samples = 200
    draw = np.random.default_rng(0)
    tokens = draw.integers(20, 200, num_samples).astype(np.int32)
    shard = np.repeat(np.arange(10), num_samples // 10).astype(np.int32)
    row = np.tile(np.arange(num_samples // 10), 10)
    zero, one = np.zeros(num_samples, int), np.ones(num_samples, int)
    columns = [shard, row, zero, [str(i) for i in range(num_samples)], tokens, one, zero, one, zero.astype(bool)]
    table = pa.table([pa.array(c, field.type) for c, field in zip(columns, SCHEMA, strict=True)], schema=SCHEMA)
    pq.write_table(table.replace_schema_metadata({"rejected": "3"}), tmp_path / LENGTHS_FILE, row_group_size=37)
    return Plan(tokens, shard, 16, 2, seed=1, shuffle_window=3), TokenLengths.open(str(tmp_path))


def rows_of(tables: Iterable[pa.Table]) -> list[dict]:
    return [row for table in tables for row in table.to_pylist()]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_blocks_belong_to_one_rank_by_turns(planned, world_size):
    plan, lengths = planned
    rows = rows_of(describe_micro_batches(plan, lengths, range(plan.num_steps), 256, world_size))
    blocks = [rows[i : i + ROWS_PER_BLOCK] for i in range(0, len(rows), ROWS_PER_BLOCK)]
    assert [{row["rank"] for row in block} for block in blocks] == [{i % world_size} for i in range(len(blocks))]
    assert len(rows) % (world_size * ROWS_PER_BLOCK) == 0


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_each_rank_meets_its_steps_in_order_and_every_example_comes_once_an_epoch(planned, world_size):
    plan, lengths = planned
    rows = rows_of(describe_micro_batches(plan, lengths, range(plan.steps_per_epoch), 256, world_size))
    for rank in range(world_size):
        steps = [row["step"] for row in rows if row["rank"] == rank and row["step"] != NO_STEP]
        assert steps == sorted(steps)
    places = [place for row in rows for place in zip(row["shard"], row["row"], strict=True)]
    assert sorted(places) == sorted((shard, row) for shard in range(10) for row in range(20))


def test_starting_later_gives_the_same_steps(planned):
    plan, lengths = planned
    whole = rows_of(describe_micro_batches(plan, lengths, range(plan.num_steps), 256, 2))
    late = rows_of(describe_micro_batches(plan, lengths, range(9, plan.num_steps), 256, 2))

    def wanted(rows: list[dict]) -> list[dict]:
        return [row for rank in range(2) for row in rows if row["rank"] == rank and row["step"] >= 9]

    assert wanted(late) == wanted(whole)


def test_a_start_at_a_late_step_packs_nothing_before_a_window_is_read(planned, monkeypatch):
    plan, _ = planned
    monkeypatch.setattr("llava_ray.data.descriptors.assign_to_ranks", None)
    windows = list(plan_windows(plan, range(17, plan.num_steps), 256, 2))
    assert [window["first_step"] for window in windows] == [17, 25]
    assert sum(sum(window["sizes"]) for window in windows) == sum(
        len(plan.step(step)) for step in range(17, plan.num_steps)
    )
    assert list(plan_windows(plan, range(26, 26), 256, 2)) == []


@pytest.mark.parametrize("first", [0, 5, 13, 25])
def test_the_windows_of_any_start_hold_the_plans_steps(planned, monkeypatch, first):
    plan, lengths = planned
    monkeypatch.setattr("llava_ray.data.descriptors._steps_per_window", lambda *arguments: 3)
    windows = list(plan_windows(plan, range(first, plan.num_steps), 256, 2))
    assert [window["first_step"] for window in windows] == list(range(first, plan.num_steps, 3))
    tables = [describe_window(window, lengths, 256, 2) for window in windows]
    assert all(table.num_rows % (2 * ROWS_PER_BLOCK) == 0 for table in tables)
    rows = [row for row in rows_of(tables) if row["step"] != NO_STEP]
    assert {row["step"] for row in rows} == set(range(first, plan.num_steps))
    for step in range(first, plan.num_steps):
        mine = [row for row in rows if row["step"] == step]
        places = [20 * shard + row for one in mine for shard, row in zip(one["shard"], one["row"], strict=True)]
        assert sorted(places) == sorted(plan.step(step))
        assert {row["num_supervised"] for row in mine} == {len(plan.step(step))}


def test_ids_stay_on_storage_and_a_file_written_before_is_read(planned):
    _, lengths = planned
    assert (lengths.num_rejected, lengths.num_truncated) == (3, 0)
    assert len(pickle.dumps(lengths)) < 500
    assert lengths.take(np.array([150, 3, 3]), ["shard", "row"]).to_pylist() == [
        {"shard": 7, "row": 10},
        {"shard": 0, "row": 3},
        {"shard": 0, "row": 3},
    ]
    (Path(lengths.path) / LENGTHS_FILE).write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"lengths.parquet cannot be read .*delete the folder"):
        TokenLengths.open(lengths.path)


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
