"""Spaces that can and cannot be searched, and the recipe that a sweep writes."""

from pathlib import Path

import pytest

from llava_ray.config.finetune import FinetuneConfig
from llava_ray.config.recipes import load_recipe, settings_hash
from llava_ray.config.space import Dimension, Space
from llava_ray.config.sweep_recipes import as_toml, corners, load_sweep
from llava_ray.errors import ConfigError

RECIPE = """
[space]
"model.mm_projector_type" = { choice = ["linear", "mlp2x_gelu"] }
"train.learning_rate" = { log_uniform = [1e-4, 1e-2] }
"lora.lora_enable" = { choice = [false, true] }
"lora.lora_r" = { choice = [8, 64], when = { "lora.lora_enable" = [true] } }
[model]
model_name_or_path = "m"
[data]
data_path = "d.json"
[held_out]
path = "h.json"
"""


def write(folder: Path, text: str = RECIPE, **changes: str) -> list[str]:
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    path = folder / "small.toml"
    path.write_text(text)
    return [str(path)]


def space_of(**dimensions: object) -> Space:
    return Space.parsed({"dimensions": {key.replace("__", "."): value for key, value in dimensions.items()}})


def test_a_recipe_and_flags_become_a_config_and_a_space(tmp_path):
    config, space = load_sweep([*write(tmp_path), "--sweep.num_trials", "5", "--train.seed", "7"])
    assert (config.sweep.num_trials, config.train.seed) == (5, 7)
    assert space.dimensions["train.learning_rate"].log_uniform == (1e-4, 1e-2)
    assert isinstance(config.base, FinetuneConfig)
    assert not hasattr(config.base, "sweep")


def test_the_name_follows_from_the_space_too(tmp_path):
    first = load_sweep(write(tmp_path))[0].run.name
    second = load_sweep(write(tmp_path, RECIPE.replace("[8, 64]", "[8, 32]")))[0].run.name
    assert first != second
    assert first.startswith("small-")
    assert load_sweep([*write(tmp_path), "--run.name", "mine"])[0].run.name == "mine"


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('"train.learning_rate"', '"train.lerning_rate"', "no setting of a run"),
        ('"train.learning_rate"', '"train.max_steps"', "the same for all trials"),
        ('"train.learning_rate"', '"run.name"', "the same for all trials"),
        ("[1e-4, 1e-2]", "[1e-2, 1e-4]", "expected the lower bound first"),
        ("log_uniform = [1e-4, 1e-2]", "choice = []", "at least one value"),
        ("log_uniform = [1e-4, 1e-2]", "choice = [1], uniform = [0, 1]", "expected one of choice"),
        ("log_uniform = [1e-4, 1e-2]", "loguniform = [1e-4, 1e-2]", "unknown key.*loguniform"),
        ('when = { "lora.lora_enable"', 'when = { "lora.lora_alpha"', "not named before it"),
        ('["linear", "mlp2x_gelu"]', '["linear", "mlp0x"]', "settings that are invalid for a run.*unknown projector"),
        ('[held_out]\npath = "h.json"', "", "set held_out.path"),
    ],
)
def test_what_cannot_be_searched_is_refused_before_anything_starts(tmp_path, old, new, said):
    with pytest.raises(ConfigError, match=said):
        load_sweep(write(tmp_path, RECIPE.replace(old, new)))


def test_a_sweep_without_a_recipe_says_where_some_are():
    with pytest.raises(ConfigError, match="shipped ones are sweep/llava_v1_5_7b"):
        load_sweep(["--train.seed", "1"])


def test_corners_have_every_value_under_its_condition(tmp_path):
    _, space = load_sweep(write(tmp_path))
    found = list(corners(space))
    assert {settings.get("lora.lora_r") for settings in found if settings["lora.lora_enable"]} == {8, 64}
    assert all("lora.lora_r" not in settings for settings in found if not settings["lora.lora_enable"])
    assert {settings["train.learning_rate"] for settings in found} == {1e-4, 1e-2}


def test_a_range_and_a_choice_know_their_corners():
    assert Dimension(choice=(1, 2)).corners == (1, 2)
    assert Dimension(uniform=(0, 1)).corners == (0, 1)
    with pytest.raises(ConfigError, match="the space is empty"):
        space_of()


def test_a_written_recipe_gives_the_same_run_again(tmp_path):
    config, _ = load_sweep(write(tmp_path))
    changes = {
        "model.mm_vision_select_layer": (-2, -5),
        "train.learning_rate": 1e-05,
        "model.version": 'odd "name" – \\',
        "lora.lora_enable": True,
    }
    run = config.base.replaced({**changes, "run.name": None})
    path = tmp_path / "best.toml"
    path.write_text(as_toml(run, "Best of\nall"))
    again = load_recipe(FinetuneConfig, [str(path)])
    assert settings_hash(again) == settings_hash(run)
    assert again.model == run.model
    assert again.held_out == run.held_out
    assert path.read_text().startswith("# Best of\n# all\n")
