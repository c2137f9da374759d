"""Mixtures in commands that start nothing: shares in the dry run, sources in preparation's checks and the preview."""

import json
from pathlib import Path

import pytest
from fakes import make_tokenizer
from samples import small_run

from llava_ray.config.finetune import FinetuneConfig
from llava_ray.config.preview import PreviewSettings, open_recipe
from llava_ray.errors import ConfigError, DataError
from llava_ray.train.planning.dry_run import tell_data
from llava_ray.train.preflight import check_run
from pipelines.places import check_data_places
from pipelines.preview import main as preview

RECIPE = """
[model]
model_name_or_path = "lm"
version = "v1"
[train]
model_max_length = 900
[[data.sources]]
name = "first"
data_path = "{first}"
weight = 3
[[data.sources]]
name = "second"
data_path = "{second}"
weight = 1
version = "v0"
max_samples = 3
"""


def write_texts(path: Path, count: int) -> Path:
    turns = [{"from": "human", "value": "one?"}, {"from": "gpt", "value": "two"}]
    path.write_text(json.dumps([{"id": f"t{number}", "conversations": turns} for number in range(count)]))
    return path


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "mixed.toml"
    first, second = (write_texts(tmp_path / f"{name}.json", count) for name, count in (("first", 30), ("second", 8)))
    path.write_text(RECIPE.format(first=first, second=second))
    return path


def mixed_run(folder: Path, sources: list[dict[str, object]]) -> FinetuneConfig:
    values = small_run(folder, num_samples=4).model_dump()
    values["data"] |= {"data_path": "", "sources": sources}
    return FinetuneConfig.parsed(values)


def test_the_dry_run_tells_the_shares(tmp_path):
    first, second = write_texts(tmp_path / "a.json", 30), write_texts(tmp_path / "b.json", 8)
    sources = [
        {"name": "a", "data_path": str(first), "weight": 3},
        {"name": "b", "data_path": str(second), "weight": 1, "max_samples": 7},
        {"name": "c", "data_path": str(second), "epochs": 2},
    ]
    config = mixed_run(tmp_path, sources)
    lines = list(tell_data(config))
    assert [line.split() for line in lines[:4]] == [
        ["Epoch:", "44", "samples", "of", "3", "source(s)"],
        ["data.sources.0", "(a)", "21", "of", "30", "47.73%", "0.7", "passes"],
        ["data.sources.1", "(b)", "7", "of", "7", "15.91%", "1", "passes"],
        ["data.sources.2", "(c)", "16", "of", "8", "36.36%", "2", "passes"],
    ]
    assert lines[4].startswith("Steps 6 of 8 samples")


def test_a_source_without_records_or_of_a_missing_file_is_named(tmp_path):
    empty = write_texts(tmp_path / "empty.json", 0)
    sources = [{"name": "a", "data_path": str(write_texts(tmp_path / "a.json", 3)), "weight": 1}]
    config = mixed_run(tmp_path, [*sources, {"name": "b", "data_path": str(empty), "weight": 1}])
    with pytest.raises(DataError, match=r"data.sources.1 \(b\): .*holds no record"):
        list(tell_data(config))
    gone = mixed_run(tmp_path, [*sources, {"name": "b", "data_path": str(tmp_path / "b.json"), "weight": 1}])
    with pytest.raises(ConfigError, match=r"data.sources.1.data_path = .*nothing is there"):
        check_data_places(gone.data)
    with pytest.raises(DataError, match=r"data.sources.1 \(b\): "):
        check_run(gone)


def test_a_template_of_a_source_that_does_not_exist_is_named(tmp_path):
    source = {"name": "a", "data_path": str(write_texts(tmp_path / "a.json", 3)), "weight": 1, "version": "v7"}
    with pytest.raises(ConfigError, match=r"data.sources.0 \(a\): no conversation template is called 'v7'"):
        check_run(mixed_run(tmp_path, [source]))


def test_a_preview_shows_one_source_by_its_own_rules(recipe, tmp_path, capsys):
    found = open_recipe(PreviewSettings(data=str(recipe), source="second", tokenizer="t"))
    assert (Path(found.data).name, found.version, found.model_max_length, found.max_samples) == (
        "second.json",
        "v0",
        900,
        3,
    )
    assert open_recipe(PreviewSettings(data=str(recipe), source="first", version="mpt")).version == "mpt"
    preview(["--data", str(recipe), "--source", "second", "--tokenizer", str(make_tokenizer(tmp_path)), "--json"])
    assert len(capsys.readouterr().out.splitlines()) == 3


@pytest.mark.parametrize(
    ("data", "source", "message"),
    [
        ("mixed.toml", None, r"is a mixture: give --source with one of first, second"),
        ("mixed.toml", "third", r"is a mixture: give --source with one of first, second"),
        ("first.json", "first", r"--source first: only a recipe has sources"),
    ],
)
def test_a_preview_of_no_source_says_which_there_are(recipe, data, source, message):
    with pytest.raises(ConfigError, match=message):
        open_recipe(PreviewSettings(data=str(recipe.parent / data), source=source))
