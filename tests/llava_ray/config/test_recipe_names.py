"""Shipped recipes are found by name, whatever the folder one is in; files of one's own come first."""

from pathlib import Path

import pytest

from llava_ray import invocation
from llava_ray.config.evaluate import EvaluateConfig
from llava_ray.config.finetune import FinetuneConfig, PrepareConfig
from llava_ray.config.recipes import load_recipe, load_settings
from llava_ray.config.review import ReviewConfig
from llava_ray.config.shipped_recipes import find_recipe, list_recipes
from llava_ray.config.sweep_recipes import load_sweep
from llava_ray.errors import ConfigError

FOLDER = Path(__file__).parents[3] / "pipelines/recipes"
COMMANDS = ("finetune", "prepare", "evaluate", "review", "preferences", "improve", "sweep")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(invocation.STARTED_AS_VARIABLE, raising=False)
    return tmp_path


@pytest.mark.parametrize(
    "name",
    [
        "llava_v1_5_7b_lora",
        "llava_v1_5_7b_lora.toml",
        "finetune/llava_v1_5_7b_lora",
        "finetune/llava_v1_5_7b_lora.toml",
        "pipelines/recipes/finetune/llava_v1_5_7b_lora.toml",
    ],
)
def test_every_spelling_is_the_same_recipe_and_the_same_run(name: str) -> None:
    path = FOLDER / "finetune/llava_v1_5_7b_lora.toml"
    assert Path(find_recipe(name, "finetune")) == path
    more = ["--data.data_path", "x.json"]
    assert load_recipe(FinetuneConfig, [name, *more]) == load_recipe(FinetuneConfig, [str(path), *more])


def test_every_shipped_recipe_has_a_command_and_is_found_by_its_full_name() -> None:
    listed = {one for command in COMMANDS for one in list_recipes(command)}
    assert listed == {f"{path.parent.name}/{path.stem}" for path in FOLDER.glob("*/*.toml")}
    for command in COMMANDS:
        for name in list_recipes(command):
            assert Path(find_recipe(name, command)) == FOLDER / f"{name}.toml"


def test_other_commands_take_theirs_by_name() -> None:
    assert load_settings(EvaluateConfig, ["llava_v1_5", "--evaluate.model_path", "m"]).score.profile == "llava"
    files = [f"--review.{name}={name}.jsonl" for name in ("questions", "references", "answers")]
    review = ["mm_vet", *files, "--judge.model", "m", "--review.output", "o"]
    assert load_settings(ReviewConfig, review).review.mode == "grade"
    config, space = load_sweep(["quickstart"])
    assert config.run.name == "sweep"  # as the recipe has it
    assert space.dimensions
    ignored = ("model", "train", "lora", "tracking")
    assert load_recipe(PrepareConfig, ["yours"], ignore=ignored).run.name


def test_a_name_of_two_stages_is_not_guessed() -> None:
    with pytest.raises(ConfigError, match=r"finetune/llava_v1_5_7b or pretrain/llava_v1_5_7b: name it with its stage"):
        load_recipe(FinetuneConfig, ["llava_v1_5_7b"])
    assert load_recipe(FinetuneConfig, ["pretrain/llava_v1_5_7b"]).model.tune_mm_mlp_adapter


@pytest.mark.parametrize(
    ("name", "command", "said"),
    [
        ("llava_v1_5_7b_lroa", "finetune", "did you mean finetune/llava_v1_5_7b_lora"),
        ("fintune/llava_v1_5_13b", "finetune", "did you mean finetune/llava_v1_5_13b"),
        ("mm_vett", "review", "did you mean review/mm_vet"),
        ("mm_vet", "sweep", "llava-ray sweep takes sweep/llava_v1_5_7b, sweep/quickstart, or"),  # of another command
        ("x" * 10_000, "evaluate", "llava-ray evaluate takes evaluate/llava_v1_5, or the path of a TOML file"),
        ("a\0b", "finetune", "no recipe"),
        ("../finetune/llava_v1_5_13b", "finetune", "no recipe"),
    ],
)
def test_an_unknown_name_is_answered_with_close_ones_and_all_of_the_command(name: str, command: str, said: str) -> None:
    with pytest.raises(ConfigError, match="no recipe") as caught:
        find_recipe(name, command)
    assert said in str(caught.value)
    assert all(one in str(caught.value) for one in list_recipes(command))
    assert len(str(caught.value)) < 1500


def test_a_file_of_ones_own_wins(elsewhere: Path) -> None:
    for name in ("llava_v1_5_7b_lora", "llava_v1_5_7b"):
        (elsewhere / name).write_text('[model]\nmodel_name_or_path = "own"\n[data]\ndata_path = "x"\n')
        assert load_recipe(FinetuneConfig, [name]).model.model_name_or_path == "own"
