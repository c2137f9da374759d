"""What can be known before Ray starts is said before it does, and before torch is imported where it can be."""

import json
import sys

import pytest
import ray

from llava_ray.config.finetune import FinetuneConfig
from llava_ray.errors import ConfigError, DataError, ModelError
from pipelines import chat, evaluate, export, finetune, prepare, preview, sweep

RECIPE = """
[model]
model_name_or_path = "{folder}/language_model"
vision_tower = "{folder}/vision_tower"
[data]
data_path = "{folder}/data.json"
[run]
storage_path = "{folder}/runs"
"""
SPACE = (
    '[space]\n"model.vision_tower" = { choice = ["%s"] }\n[sweep]\nmethod = "grid"\n[held_out]\npath = "%s/data.json"\n'
)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A recipe whose parts and data are there, by name; what follows must not start Ray."""
    for name in ("language_model", "vision_tower"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    (tmp_path / "data.json").write_text("[]")
    (tmp_path / "recipe.toml").write_text(RECIPE.format(folder=tmp_path))
    (tmp_path / "sweep.toml").write_text(RECIPE.format(folder=tmp_path) + SPACE % (f"{tmp_path}/vision_towr", tmp_path))
    monkeypatch.setattr(ray, "init", lambda *_, **__: pytest.fail("Ray was started"))
    return tmp_path


@pytest.mark.parametrize(
    ("command", "arguments", "said"),
    [
        (
            finetune,
            ["recipe.toml", "--data.data_path", "{0}/dta.json"],
            r"data\.data_path = .*did you mean '.*data\.json'",
        ),
        (finetune, ["recipe.toml", "--data.image_folder", "{0}/images"], r"data\.image_folder = .*nothing is there"),
        (finetune, ["recipe.toml", "--held_out.path", "{0}/held"], r"held_out\.path = .*nothing is there"),
        (finetune, ["recipe.toml", "--vision_tower", "{0}/visiontower"], "did you mean '.*vision_tower'"),
        (finetune, ["recipe.toml", "--model_name_or_path", "s3://bucket/llm"], "models are read from folders"),
        (prepare, ["--data.data_path", "{0}/nowhere/data.json"], r"data\.data_path = .*holds no 'nowhere'"),
        (sweep, ["sweep.toml"], r"space\.model\.vision_tower = .*did you mean '.*vision_tower'"),
        (
            evaluate,
            ["run", "--evaluate.model_path", "{0}/m", "--evaluate.benchmarks", "gqa={0}"],
            "evaluate.model_path",
        ),
        (
            evaluate,
            ["run", "--evaluate.model_path", "{0}/language_model", "--evaluate.benchmarks", "gqa={0}/gqa"],
            "evaluate.benchmarks, gqa = .*nothing is there",
        ),
        (chat, ["{0}/model", "--prompt", "x"], "model = .*nothing is there"),
        (
            preview,
            ["--tokenizer", "{0}/language_model", "--version", "v1", "--data", "{0}/d"],
            "data = .*nothing is there",
        ),
        (export, ["hub", "{0}/model", "{0}/out"], "the model = .*nothing is there"),
        (export, ["bundle", "{0}/language_model", "{0}"], "is there already; an export overwrites nothing"),
    ],
)
def test_what_is_not_there_is_named_by_its_key_at_once(folder, command, arguments, said, monkeypatch):
    monkeypatch.chdir(folder)
    given = [word.format(folder) for word in arguments]
    with pytest.raises(ConfigError, match=said):
        command.main(given)
    assert not (folder / "runs").exists()


def test_hub_ids_and_urls_of_data_are_nobodys_paths():
    from pipelines.places import check_files, check_models

    check_models({"a": "gpt2", "b": "openai/clip-vit-large-patch14-336", "c": None})
    check_files({"a": "s3://bucket/mix.json", "b": "shards/*.parquet"})
    with pytest.raises(ConfigError, match="nothing is there"):
        check_models({"a": "x/" * 3000})
    with pytest.raises(ConfigError, match="nothing is there"):
        check_models({"a": "a\0b"})


@pytest.mark.slow
def test_data_of_no_format_models_that_are_none_and_used_names_are_refused_before_ray(folder, tmp_path_factory):
    from samples import small_run, write_recipe

    from llava_ray.train.identity import identify_run
    from llava_ray.train.runs import SNAPSHOT_COPY, RunFolder, claim_run

    recipe = str(folder / "recipe.toml")
    with pytest.raises(ModelError, match="language_model"):
        finetune.main([recipe])
    (folder / "data.docx").write_text("x")
    for command in (finetune, prepare):
        with pytest.raises(DataError, match="is of no known format"):
            command.main([recipe, "--data.data_path", str(folder / "data.docx")])

    own = tmp_path_factory.mktemp("used")
    config: FinetuneConfig = small_run(own, num_samples=4, **{"run.name": "used"})
    claim_run(RunFolder(config.run.storage_path, "used"), config, identify_run(config, "0123"))
    (own / "runs/used" / SNAPSHOT_COPY).write_text(json.dumps({}))  # a checkpoint was committed once
    given = [str(write_recipe(own, config)), "--run.name", "used", "--train.learning_rate", "0.5"]
    with pytest.raises(ConfigError, match=r"made with other settings \(train\.learning_rate: 0\.01 -> 0\.5\)"):
        finetune.main(given)
    with pytest.raises(ConfigError, match="MLflow at 'floppy:disk'"):
        finetune.main([*given[:3], "--tracking.tracking_uri", "floppy:disk"])
    assert "ray" in sys.modules
    assert not ray.is_initialized()
