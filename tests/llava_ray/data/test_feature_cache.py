"""Cached features on storage: names, budget, least recently used, and reading exactly what is asked for."""

import json
import time
from pathlib import Path

import pytest

from llava_ray.data.feature_cache import (
    FeatureKey,
    block_name,
    fetch_features,
    format_gb,
    list_entries,
    location_key,
    make_room,
    read_index,
    write_index,
)
from llava_ray.errors import ConfigError, DataError

OLD = 100_000  # seconds: more than a day


def write_entry(root: Path, name: str, size: int, age: float) -> None:
    """An entry of some bytes, used so many seconds ago."""
    (root / name).mkdir(parents=True)
    (root / name / "00000-000000.bin").write_bytes(b"0" * size)
    (root / name / "used").write_text(str(time.time() - age))


def test_a_key_names_an_entry_by_everything_that_decides_it():
    key = FeatureKey("data", "tower", "-2 patch", "pad", "float32")
    names = {key.name} | {FeatureKey(**{**vars(key), field: "other"}).name for field in vars(key)}
    assert len(names) == 6
    assert FeatureKey(**vars(key)).name == key.name


def test_room_is_made_by_dropping_what_was_used_longest_ago(tmp_path):
    for number, age in enumerate([3 * OLD, 2 * OLD, OLD]):
        write_entry(tmp_path, f"e{number}", 1000, age)
    assert make_room(str(tmp_path), "new", 900, 2500) == ["e0", "e1"]
    assert list_entries(str(tmp_path)) == ["e2"]


def test_what_may_be_in_use_is_never_dropped_and_nothing_is_when_that_is_not_enough(tmp_path):
    write_entry(tmp_path, "old", 1000, OLD)
    write_entry(tmp_path, "fresh", 1000, 10)
    with pytest.raises(ConfigError, match=r"may be reading.*feature_cache_gb.*delete the entries"):
        make_room(str(tmp_path), "new", 1500, 2000)
    assert list_entries(str(tmp_path)) == ["fresh", "old"]


def test_more_than_the_budget_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ConfigError, match=r"up to 2e-06 GB, over data.feature_cache_gb = 1e-06.*'streamed'"):
        make_room(str(tmp_path), "new", 2000, 1000)
    assert format_gb(1.25e9) == "1.25 GB"


def test_an_index_finds_each_images_bytes_and_only_those(tmp_path):
    entry = str(tmp_path)
    for shard, content in ((0, b"aabbb"), (1, b"cccc")):
        name = block_name(shard, 0)
        (tmp_path / f"{name}.bin").write_bytes(content)
    first = [
        [location_key(0, 0, 0), 0, 2],
        [location_key(0, 1, 0), 2, 3],
        [location_key(0, 1, 1), 0, 2],
    ]  # an image twice
    (tmp_path / f"{block_name(0, 0)}.json").write_text(json.dumps(first))
    (tmp_path / f"{block_name(1, 0)}.json").write_text(json.dumps([[location_key(1, 5, 2), 0, 4]]))
    assert write_index(entry, [block_name(0, 0), block_name(1, 0)]) == 4
    wanted = [location_key(1, 5, 2), location_key(0, 1, 1), location_key(0, 1, 0)]
    assert fetch_features(entry, wanted) == [b"cccc", b"aa", b"bbb"]
    assert fetch_features(entry, []) == []
    with pytest.raises(DataError, match="lacks features"):
        fetch_features(entry, [location_key(2, 0, 0)])


def test_an_entry_that_is_gone_says_what_to_do(tmp_path):
    with pytest.raises(DataError, match=r"are gone: start the run again.*feature_cache_gb"):
        read_index(str(tmp_path / "nowhere"))
