"""Rows keep what was written to them while others come and go, and never more memory than allowed."""

import random

import pytest
import torch

from llava_ray.generate.builtin.kv_cache import CacheSlot, KvCache, longest_slot, slot_length


def test_row_lengths() -> None:
    assert [slot_length(count) for count in (1, 128, 129, 193, 257, 385, 513)] == [128, 128, 192, 256, 384, 512, 768]
    assert [longest_slot(count) for count in (100, 128, 191, 192, 8192)] == [0, 128, 128, 192, 8192]
    assert all(slot_length(count) >= count and slot_length(count) < 1.51 * max(count, 128) for count in range(1, 5000))


def write(row: CacheSlot, value: float) -> None:
    like = torch.zeros(1, 2, 1, 4)
    for index in range(2):
        layer = row.size_class.layer(index, like, like)
        layer.keys[row.index] = value
        layer.values[row.index] = -value


def holds(row: CacheSlot, value: float) -> bool:
    return all(
        bool((layer.keys[row.index] == value).all() and (layer.values[row.index] == -value).all())
        for layer in row.size_class.layers.values()
    )


def test_rows_keep_their_contents() -> None:
    draw, cache = random.Random(0), KvCache(128 * 20)
    rows: dict[float, CacheSlot] = {}
    refused = 0
    for value in range(1, 400):
        row = cache.reserve(draw.choice([5, 128, 150, 300]))
        if row is None:
            refused += 1
            for leaving in draw.sample(sorted(rows), k=len(rows) // 2):
                cache.release(rows.pop(leaving))
        else:
            write(row, float(value))
            rows[value] = row
        assert all(holds(other, number) for number, other in rows.items())
        assert cache.num_reserved == sum(other.size_class.length for other in rows.values()) <= cache.num_allocated
        assert cache.num_allocated <= cache.capacity
        for size_class in cache.size_classes.values():
            assert [other.index for other in size_class.rows] == list(range(len(size_class.rows)))
            assert all(len(layer.keys) == size_class.num_slots for layer in size_class.layers.values())
    assert refused > 5


@pytest.mark.parametrize("capacity", [128, 127])
def test_a_row_longer_than_the_cache(capacity: int) -> None:
    assert KvCache(capacity).reserve(129) is None
    assert (KvCache(capacity).reserve(128) is None) == (capacity < 128)


def test_nothing_that_a_row_held_is_read_by_the_next() -> None:
    """Attention multiplies what it masks by 0, which would leave a NaN as it is."""
    cache = KvCache(128 * 8)
    rows = [cache.reserve(128) for _ in range(3)]
    for row in rows:
        assert row is not None
        write(row, float("nan"))
    for row in rows:
        assert row is not None
        cache.release(row)
    for _ in range(3):
        row = cache.reserve(128)
        assert row is not None
        assert holds(row, 0.0)
