"""Blocks of known text: found by what stands before them, never more than allowed, and gone when memory is needed."""

import itertools
import random
from dataclasses import dataclass, field

import pytest
import torch

from llava_ray.generate.builtin.kv_cache import CacheSlot, KvCache
from llava_ray.generate.builtin.prefix_cache import PrefixCache
from llava_ray.generate.builtin.prefix_keys import BLOCK, BlockKeys, KeyRoots

ROOTS = KeyRoots()


@dataclass
class Placed:
    key: str
    first: int
    num_tokens: int = 20


def keys(ids: list[int], count: int, *images: Placed, adapter: str | None = None) -> list[bytes]:
    return BlockKeys(ROOTS.find(adapter), ids, images).first(count)


def test_a_key_stands_for_all_that_comes_before() -> None:
    ids = list(range(64))
    found = keys(ids, 4)
    assert len(set(found)) == 4
    assert keys(ids, 4) == found
    assert keys([*ids[:63], 7], 4)[:3] == found[:3]
    assert keys([*ids[:63], 7], 4)[3] != found[3]
    changed = keys([7, *ids[1:]], 4)
    assert not set(changed) & set(found)
    assert not set(keys(ids, 4, adapter="a")) & set(found)
    assert not set(keys(ids[BLOCK:], 3)) & set(found)  # the same text elsewhere


def test_images_are_told_apart_by_content_and_place() -> None:
    ids = [1] * 10 + [-200] * 40 + [2] * 14
    one, two = Placed("one", 10), Placed("two", 30)
    found = keys(ids, 4, one, two)
    others = [(two, one), (Placed("one", 10), Placed("one", 30)), (Placed("one", 10, 40),), (Placed("two", 10), two)]
    for other in others:
        placed = [Placed(image.key, place, image.num_tokens) for image, place in zip(other, (10, 30), strict=False)]
        different = keys(ids, 4, *placed)
        assert different[-1] != found[-1]
    assert keys(ids, 4, one, Placed("three", 30))[0] == found[0]  # its tokens begin later


def test_an_answer_continues_its_prompt() -> None:
    ids = list(range(70))
    whole = keys(ids, 4)
    for length in (1, 15, 16, 17, 63, 64, 70):
        growing = BlockKeys(ROOTS.find(None), ids[:length])
        growing.first(length // BLOCK)
        assert growing.first(4, ids[length:]) == whole


def test_an_adapter_that_was_replaced_shares_nothing_with_its_predecessor() -> None:
    roots = KeyRoots()
    before = roots.find("a"), roots.find(None)
    assert (roots.find("a"), roots.find(None)) == before
    roots.renew("a")
    assert roots.find("a") != before[0]
    assert roots.find(None) == before[1]
    roots.renew("unknown")
    assert KeyRoots().find(None) != before[1]


def block(value: int) -> torch.Tensor:
    return torch.full((4,), float(value))


def keep(cache: PrefixCache, text: list[bytes], room: int = 10**6) -> None:
    cache.keep(text, {key: block(number) for number, key in enumerate(text)}, room)


def test_the_least_recently_used_text_leaves_from_its_end() -> None:
    cache = PrefixCache(4 * BLOCK)
    old, new = [b"a", b"b", b"c"], [b"x", b"y"]
    keep(cache, old)
    keep(cache, new)
    assert [key in cache for key in (*old, *new)] == [True, True, False, True, True]
    cache.find(old)
    keep(cache, [b"z"])
    assert [key in cache for key in (*old, *new)] == [True, True, False, True, False]
    assert cache.num_evicted == 2
    assert [float(found[0]) for found in cache.find([b"x", b"?", b"a"])] == [0.0]


def test_a_text_longer_than_the_cache_keeps_its_beginning() -> None:
    cache = PrefixCache(3 * BLOCK + 5)
    text = [bytes([number]) for number in range(9)]
    keep(cache, text)
    assert len(cache.find(text)) == 3
    keep(cache, text)
    assert cache.num_tokens == 3 * BLOCK
    keep(cache, [b"other", *text[1:]], room=2 * BLOCK)
    assert cache.num_tokens <= 2 * BLOCK
    assert b"other" in cache
    cache.forget([b"other", b"unknown"])
    assert b"other" not in cache
    off = PrefixCache(BLOCK - 1)
    keep(off, text)
    assert (off.is_on, off.num_tokens) == (False, 0)


@dataclass(eq=False)
class Asked:
    """A request of the random test: its tokens, of which the values in the slot are a function."""

    ids: list[int]
    row: CacheSlot
    written: int = 0
    keys: BlockKeys = field(init=False)

    def __post_init__(self) -> None:
        self.keys = BlockKeys(ROOTS.find(None), self.ids)


def values(ids: list[int], layer: int) -> torch.Tensor:
    """What a model might write: each token's depends on all before it."""
    sums = torch.tensor(list(itertools.accumulate(ids)), dtype=torch.float32) + layer
    return sums[None, :, None].expand(2, -1, 3)


def write(asked: Asked, count: int) -> None:
    like = torch.zeros(1, 2, 1, 3)
    for index in range(2):
        layer = asked.row.size_class.layer(index, like, like)
        span = slice(asked.written, asked.written + count)
        layer.keys[asked.row.index, :, span] = values(asked.ids, index)[:, span]
        layer.values[asked.row.index, :, span] = -values(asked.ids, index)[:, span]
    asked.written += count


def check(asked: Asked) -> None:
    for index, layer in asked.row.size_class.layers.items():
        expected = values(asked.ids, index)[:, : asked.written]
        assert torch.equal(layer.keys[asked.row.index, :, : asked.written], expected)
        assert torch.equal(layer.values[asked.row.index, :, : asked.written], -expected)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("capacity", [128 * 3, 128 * 12, 128 * 40])
def test_random_requests_find_only_their_own_text_and_leave_nothing_reserved(capacity: int, seed: int) -> None:
    """Requests are admitted, read, kept, aborted and finished in any order, over texts with common beginnings."""
    draw = random.Random(seed)
    cache = KvCache(capacity, [capacity, capacity // 2, 0][seed % 3])
    beginnings = [[draw.randrange(9) for _ in range(draw.choice([20, 64, 90]))] for _ in range(4)]
    running: list[Asked] = []
    reused = refused = 0
    for _ in range(250):
        action = draw.random()
        if action < 0.4:
            beginning = draw.choice(beginnings)
            ids = beginning[: draw.randint(1, len(beginning))] + [draw.randrange(9) for _ in range(draw.randint(1, 60))]
            row = cache.reserve(len(ids))
            if row is None:
                refused += 1
            else:
                running.append(Asked(ids, row))
                asked = running[-1]
                found = cache.load_prefix(row, 0, asked.keys.first((len(ids) - 1) // BLOCK))
                asked.written, reused = found, reused + found
        elif running and action < 0.7:
            asked = draw.choice(running)
            write(asked, draw.randint(0, len(asked.ids) - asked.written))
            cache.keep_prefix(asked.row, asked.keys.first(asked.written // BLOCK))
        elif running:
            asked = running.pop(draw.randrange(len(running)))
            if draw.random() < 0.5:
                cache.keep_prefix(asked.row, asked.keys.first(asked.written // BLOCK))
            if draw.random() < 0.1:
                cache.prefixes.forget(asked.keys.first(asked.written // BLOCK))
            cache.release(asked.row)
        for asked in running:
            check(asked)
        assert cache.num_reserved == sum(asked.row.size_class.length for asked in running)
        assert cache.num_allocated + cache.prefixes.num_tokens <= capacity
        assert cache.prefixes.num_tokens <= cache.prefixes.max_tokens
    for asked in running:
        cache.release(asked.row)
    assert cache.num_reserved == 0
    assert cache.prefixes.is_on or not reused
    assert reused or not cache.prefixes.is_on or capacity == 128 * 3
    assert refused or capacity > 128 * 12
    cache.prefixes.shrink(0)
    assert cache.prefixes.num_tokens == 0
    # All of the memory can still be had: nothing of it is held by what has gone.
    rows = [cache.reserve(128) for _ in range(capacity // 128)]
    assert None not in rows
    assert cache.reserve(1) is None
