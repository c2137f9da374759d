"""The shares of an epoch, and a plan and lengths over several sources."""

import random
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llava_ray.config.data import DataConfig
from llava_ray.config.sources import SourceConfig
from llava_ray.data.mixed_lengths import MixedLengths
from llava_ray.data.mixture import count_draws, join_sources, naming_source
from llava_ray.data.plan import Plan, PlanSource
from llava_ray.data.settings import StreamSettings
from llava_ray.data.shards import PreparedData, ShardInfo
from llava_ray.data.token_lengths import LENGTHS_FILE, SCHEMA, TokenLengths
from llava_ray.errors import ConfigError, DataError


def sources(*measures: dict[str, float]) -> list[SourceConfig]:
    return [SourceConfig(name=f"s{number}", data_path="x", **measure) for number, measure in enumerate(measures)]


@pytest.mark.parametrize(
    ("measures", "sizes", "epoch", "draws"),
    [
        ([{"weight": 1}, {"weight": 1}], [100, 40], None, [40, 40]),
        ([{"weight": 3}, {"weight": 1}], [100, 40], None, [100, 33]),
        ([{"weight": 0.7}, {"weight": 0.1}], [70, 1000], None, [70, 10]),
        ([{"weight": 2}, {"weight": 1}], [10, 10], 48, [32, 16]),
        ([{"weight": 1}, {"weight": 1}, {"weight": 1}], [50, 50, 50], 50, [17, 17, 16]),
        ([{"weight": 1}, {"epochs": 2}, {"samples": 7}], [50, 10, 100], None, [50, 20, 7]),
        ([{"weight": 1}, {"epochs": 0.5}], [50, 11], 26, [20, 6]),
        ([{"epochs": 1.5}, {"epochs": 0.1}], [7, 104], None, [11, 10]),
    ],
)
def test_the_samples_that_an_epoch_draws(measures, sizes, epoch, draws):
    assert count_draws(sources(*measures), sizes, epoch) == draws


def test_shares_are_exact_within_a_sample_and_none_is_drawn_twice_by_default():
    draw = random.Random(0)
    for _ in range(500):
        weights = [draw.choice([1, 2, 0.1, 0.3, 7.25, draw.random() + 0.01]) for _ in range(draw.randint(1, 6))]
        sizes = [draw.randint(400, 5000) for _ in weights]
        asked = draw.choice([None, draw.randint(4000, 20000)])
        found = count_draws(sources(*({"weight": weight} for weight in weights)), sizes, asked)
        total = sum(found)
        assert asked in (None, total)
        assert all(abs(n - total * w / sum(weights)) < 1 + 1e-6 for n, w in zip(found, weights, strict=True))
        if asked is None:
            assert all(n <= size for n, size in zip(found, sizes, strict=True))
            assert any(n >= size - 1 for n, size in zip(found, sizes, strict=True))


@pytest.mark.parametrize(
    ("measures", "sizes", "epoch", "message"),
    [
        ([{"weight": 1}, {"epochs": 1}], [5, 0], None, r"data.sources.1 \(s1\) has no samples"),
        ([{"weight": 1}, {"weight": 1e-6}], [5, 5], None, r"data.sources.1 \(s1\): none of its samples would be drawn"),
        ([{"epochs": 0.01}], [5], None, r"data.sources.0 \(s0\): none of its samples would be drawn"),
        ([{"weight": 1}, {"samples": 9}], [5, 5], 9, r"data.epoch_samples = 9 leaves nothing .* draw 9"),
        ([{"epochs": 1e300}], [5], None, r"is too large"),
    ],
)
def test_sources_that_would_not_be_learnt_from_are_refused(measures, sizes, epoch, message):
    with pytest.raises(ConfigError, match=message):
        count_draws(sources(*measures), sizes, epoch)


SETTINGS = {"global_batch_size": 8, "num_epochs": 3, "seed": 5, "shuffle_window": 2}


def make_plan(draws: tuple[int, int] = (20, 60), **changes: int) -> Plan:
    """Return a plan of 30 examples in three shards and 80 in eight, each of a folder with a shard more."""
    draw = np.random.default_rng(3)
    parts = []
    for shards in (3, 8):
        tokens = draw.integers(20, 400, 10 * shards).astype(np.int32)
        parts.append(PlanSource(tokens, np.repeat(np.arange(shards), 10).astype(np.int32), shards + 1))
    return Plan.of_sources(list(zip(parts, draws, strict=True)), **SETTINGS | changes)


def test_any_epoch_is_known_alone_and_draws_others_in_the_same_shares():
    plan, again = make_plan(), make_plan()
    last = again.order(2)
    assert plan.order(0).tobytes() != plan.order(1).tobytes()
    assert plan.order(2).tobytes() == last.tobytes()
    for epoch in range(3):
        order = plan.order(epoch)
        assert len(order) == len(set(order.tolist())) == 80
        assert int((order < 30).sum()) == 20
        for start in range(0, 80, 8):  # the shares of a step are those of the epoch
            assert int((order[start : start + 8] < 30).sum()) == 2
    assert sorted(set(plan.shard.tolist())) == [0, 1, 2, *range(4, 12)]


def test_the_hash_tells_shares_apart():
    plans = [make_plan(), make_plan((20, 59)), make_plan((21, 60)), make_plan(seed=6), make_plan((30, 80))]
    assert len({plan.hash for plan in plans}) == len(plans)
    assert make_plan().hash == plans[0].hash


def test_without_shuffling_an_epoch_goes_on_where_the_last_one_ended():
    plan = make_plan((20, 80), shuffle_window=0)
    drawn = [order[order < 30] for order in map(plan.order, range(3))]
    assert np.concatenate(drawn).tolist() == [*range(30), *range(30)]
    assert [order[order >= 30].tolist() for order in map(plan.order, range(2))] == [list(range(30, 110))] * 2


def write_lengths(folder, first: int, shards: list[int], key: str | None = None) -> TokenLengths:
    folder.mkdir()
    count = len(shards)
    columns = {
        name: pa.array([first + i for i in range(count)], field.type)
        for name, field in ((field.name, field) for field in SCHEMA)
        if pa.types.is_int32(field.type)
    }
    columns |= {"shard": pa.array(shards, pa.int32()), "id": pa.array(["x"] * count)}
    table = pa.table(columns | {"truncated": pa.array([False] * count)}).select(SCHEMA.names)
    with pq.ParquetWriter(folder / LENGTHS_FILE, SCHEMA) as writer:
        writer.write_table(table.cast(SCHEMA))
        writer.add_key_value_metadata({"rejected": "1"} | ({"settings": key} if key else {}))
    return TokenLengths.open(str(folder), key)


def test_lengths_of_sources_are_numbered_through(tmp_path):
    parts = [write_lengths(tmp_path / "a", 100, [0, 0, 2]), write_lengths(tmp_path / "b", 200, [0, 1])]
    prepared = SimpleNamespace(sources=[SimpleNamespace(shards=range(4)), SimpleNamespace(shards=range(2))])
    lengths = MixedLengths.of(parts, [3, 2], prepared)
    assert lengths.column("shard").tolist() == [0, 0, 2, 4, 5]
    assert lengths.column("num_tokens").tolist() == [100, 101, 102, 200, 201]
    assert lengths.num_rejected == 2
    taken = lengths.take(np.array([4, 0, 3, 2, 4], np.int32), ["num_tokens", "shard"])
    assert taken.to_pydict() == {"num_tokens": [201, 100, 200, 102, 201], "shard": [5, 0, 4, 2, 5]}


def test_lengths_of_another_tokenizer_are_refused(tmp_path):
    write_lengths(tmp_path / "tokens-one", 0, [0], "one")
    (tmp_path / "tokens-one").rename(tmp_path / "tokens-two")
    with pytest.raises(DataError, match=r"another tokenizer, template or length rule \(settings one, expected two\)"):
        TokenLengths.open(str(tmp_path / "tokens-two"), "two")


def make_stream(name: str | None, num_shards: int, **changes) -> StreamSettings:
    names = tuple(f"{name}-{number}" for number in range(num_shards))
    fields = dict.fromkeys(("encoder", "model", "image_spec", "image_tokens", "data"))
    fields |= {"prepared_path": "", "shard_names": names, "mm_hidden_size": 8, "row_length": 8, "bf16": False}
    return StreamSettings(**fields | {"vision_gpus": 0, "name": name} | changes)


def test_a_shard_of_all_is_found_in_its_source():
    parts = (make_stream("a", 2), make_stream("b", 0), make_stream("c", 3))
    mixed = make_stream(None, 0, sources=parts)
    found = [mixed.find_shard(number) for number in range(5)]
    assert [place.settings.shard_names[place.shard] for place in found] == ["a-0", "a-1", "c-0", "c-1", "c-2"]
    assert [place.source for place in found] == [0, 0, 2, 2, 2]
    place = parts[0].find_shard(1)
    assert (place.source, place.settings, place.shard) == (0, parts[0], 1)


def test_the_hash_of_a_mixture_is_of_its_sources_and_their_names():
    def folder(content: str) -> PreparedData:
        return PreparedData("p", (ShardInfo("s", 1, 1, content),), content, 4, 1, {"malformed": 1})

    one, two = folder("1"), folder("2")
    mixed = join_sources(["a", "b"], [one, two])
    assert (mixed.num_samples, mixed.num_rejected, mixed.rejected_reasons) == (8, 2, {"malformed": 2})
    hashes = {join_sources(names, [one, two]).data_hash for names in (["a", "b"], ["b", "a"], ["a", "c"])}
    assert len(hashes | {join_sources(["a", "b"], [two, one]).data_hash, one.data_hash}) == 5


def test_errors_of_a_source_begin_with_its_name():
    data = DataConfig(sources=({"name": "a", "data_path": "x", "weight": 1},))
    with pytest.raises(DataError, match=r"^data.sources.0 \(a\): nothing there"), naming_source(data, 0):
        raise DataError("nothing there")
