"""The plan: every example once an epoch, the same steps for any world size, balanced full rows."""

import numpy as np
import pytest

from llava_ray.data.plan import Plan, assign_to_ranks, pack


def make_plan(**changes) -> Plan:
    """Return a plan over 1,000 examples in ten shards."""
    draw = np.random.default_rng(0)
    settings = {"global_batch_size": 32, "num_epochs": 2, "seed": 7, "shuffle_window": 3} | changes
    return Plan(
        draw.integers(20, 400, 1000).astype(np.int32), np.repeat(np.arange(10), 100).astype(np.int32), **settings
    )


def test_an_epoch_has_each_example_once_and_its_last_step_what_remains():
    plan = make_plan()
    steps = [plan.step(i) for i in range(plan.steps_per_epoch)]
    assert sorted(np.concatenate(steps)) == list(range(1000))
    assert [len(step) for step in steps] == [32] * 31 + [8]
    assert plan.num_steps == 64


def test_epochs_differ_and_the_seed_decides():
    plan = make_plan()
    assert list(plan.step(0)) != list(plan.step(32))
    assert list(plan.step(5)) == list(make_plan().step(5))
    assert list(plan.step(5)) != list(make_plan(seed=8).step(5))


def test_max_steps_cuts_the_run_but_not_the_order():
    assert make_plan(max_steps=5).num_steps == 5
    assert list(make_plan(max_steps=5).step(4)) == list(make_plan().step(4))


def test_each_shard_is_met_in_one_window_only():
    plan = make_plan()
    shards = plan.shard[plan.order(0)]
    for shard in range(10):
        places = np.flatnonzero(shards == shard)
        assert places.max() - places.min() < 300  # three shards of a hundred


def test_a_window_of_none_keeps_the_order_of_the_file():
    assert list(make_plan(shuffle_window=0).order(1)) == list(range(1000))


def test_hash_tells_data_and_settings_apart():
    plan = make_plan()
    assert plan.hash == make_plan().hash == make_plan(max_steps=3).hash
    others = [make_plan(seed=8), make_plan(global_batch_size=16), make_plan(shuffle_window=1)]
    assert len({plan.hash, *(other.hash for other in others)}) == 4


def test_pack_fills_rows_without_overflow_or_loss():
    lengths = make_plan().num_tokens[:64].tolist()
    rows = pack(lengths, 512)
    assert sorted(i for row in rows for i in row) == list(range(64))
    assert all(sum(lengths[i] for i in row) <= 512 for row in rows)
    assert sum(lengths) / (512 * len(rows)) > 0.9


def test_pack_refuses_what_cannot_fit():
    with pytest.raises(ValueError, match="600 tokens does not fit into a row of 512"):
        pack([10, 600], 512)


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_deal_gives_every_rank_as_many_rows_and_every_position_once(world_size):
    lengths = make_plan().num_tokens[:41].tolist()
    dealt = assign_to_ranks(lengths, 512, world_size)
    assert len(dealt) == world_size
    assert len({len(rows) for rows in dealt}) == 1
    assert sorted(i for rows in dealt for row in rows for i in row) == list(range(41))


def test_deal_balances_tokens():
    lengths = make_plan().num_tokens[:128].tolist()
    loads = [sum(lengths[i] for row in rows for i in row) for rows in assign_to_ranks(lengths, 512, 4)]
    assert max(loads) / min(loads) < 1.2


def test_rows_are_filled_evenly_rather_than_one_after_the_other():
    assert sorted(sum(len(row) * 40 for row in rows) for rows in assign_to_ranks([40] * 30, 1000, 2)) == [600, 600]


def test_what_only_fits_tightly_is_not_spread_beyond_the_limit():
    lengths = [6, 6, 5, 5, 5, 3]
    for rows in assign_to_ranks(lengths, 11, 1):
        assert all(sum(lengths[i] for i in row) <= 11 for row in rows)


def test_ranks_without_samples_get_empty_rows():
    assert assign_to_ranks([5], 16, 3) == [[[0]], [[]], [[]]]
