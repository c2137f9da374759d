"""Recipes: closed keys, flags over TOML, LLaVA's bare flags, names and hashes."""

from pathlib import Path

import pytest

from llava_ray.config.finetune import FinetuneConfig, PrepareConfig
from llava_ray.config.recipes import differing_keys, load_recipe, settings_hash
from llava_ray.errors import ConfigError


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    """A recipe that lacks data_path."""
    path = tmp_path / "tiny.toml"
    path.write_text('[model]\nmodel_name_or_path = "lm"\nvision_tower = "clip"\n[train]\nlearning_rate = 1e-3\n')
    return str(path)


def test_flags_win_over_the_recipe_and_fill_what_it_lacks(recipe):
    config = load_recipe(FinetuneConfig, [recipe, "--data.data_path", "x.json", "--train.learning_rate", "2e-5"])
    assert (config.data.data_path, config.train.learning_rate) == ("x.json", 2e-5)
    assert config.model.vision_tower == "clip"


def test_a_bare_llava_flag_finds_its_section(recipe):
    config = load_recipe(FinetuneConfig, [recipe, "--data_path", "x", "--mm_projector_lr=1e-4", "--bf16", "False"])
    assert config.train.mm_projector_lr == 1e-4
    assert config.train.bf16 is False


def test_the_default_name_is_the_recipe_and_its_hash(recipe):
    arguments = [recipe, "--data_path", "x"]
    config = load_recipe(FinetuneConfig, arguments)
    assert config.run.name == f"tiny-{settings_hash(config)}"
    assert load_recipe(FinetuneConfig, [*arguments, "--cluster.num_workers", "7"]).run.name == config.run.name
    assert load_recipe(FinetuneConfig, [*arguments, "--train.seed", "7"]).run.name != config.run.name


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--mm_projector_typ", "linear"], "did you mean 'model.mm_projector_type'"),
        (["--output_dir", "x"], "use --run.storage_path and --run.name"),
        (["--per_device_train_batch_size", "4"], "--train.global_batch_size"),
    ],
)
def test_unknown_and_replaced_flags_say_what_to_use(recipe, flags, message):
    with pytest.raises(ConfigError, match=message):
        load_recipe(FinetuneConfig, [recipe, "--data_path", "x", *flags])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "[model]\nmodel_name_or_pth = 'x'",
            "unknown key 'model.model_name_or_pth'; did you mean 'model.model_name_or_path'",
        ),
        ("[model]\nmm_projector_type = 'resampler'", "'model.mm_projector_type' = 'resampler': unknown projector"),
        ("[train]\nzero_stage = 4", "'train.zero_stage' = 4"),
        ("[train]\ntokens_per_micro_batch = 5", "a sample must fit into one row"),
        ("[data]\nimage_aspect_ratio = 'stretch'", "'data.image_aspect_ratio' = 'stretch'"),
        (
            "[model]\nmodel_name_or_path = 'x'\ntune_mm_mlp_adapter = true\nfreeze_mm_mlp_adapter = true",
            "contradict each other",
        ),
        ("[trian]\nseed = 1", "unknown key 'trian'"),
        ("learning_rate = ", "is not valid TOML"),
    ],
)
def test_recipe_faults_name_the_key_and_the_file(tmp_path, text, message):
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        load_recipe(FinetuneConfig, [str(path), "--model_name_or_path", "m", "--data_path", "x"])
    assert "bad.toml" in str(caught.value)


def test_a_missing_recipe_says_what_the_shipped_ones_are_called():
    with pytest.raises(ConfigError, match=r"no recipe 'nowhere\.toml': no such file.* takes finetune/llava_v1_5_13b, "):
        load_recipe(FinetuneConfig, ["nowhere.toml"])


def test_prepare_takes_a_finetune_recipe(recipe):
    config = load_recipe(PrepareConfig, [recipe, "--data.data_path", "x"], ignore=("model", "train", "tracking"))
    assert config.data.data_path == "x"


def test_configs_are_frozen_and_replaced_validates(recipe):
    config = load_recipe(FinetuneConfig, [recipe, "--data_path", "x"])
    with pytest.raises(ValueError, match="frozen"):
        config.train.seed = 3
    assert config.replaced({"train.seed": 3}).train.seed == 3
    with pytest.raises(ConfigError, match=r"'train.seed' = -1"):
        config.replaced({"train.seed": -1})


def test_differing_keys_leave_out_what_may_change(recipe):
    old = load_recipe(FinetuneConfig, [recipe, "--data_path", "x"])
    new = old.replaced({"train.seed": 3, "cluster.num_workers": 9})
    assert differing_keys(old.model_dump(), new.model_dump()) == ["train.seed: 42 -> 3"]


def test_a_preparation_follows_the_objective_of_a_recipe_for_training(tmp_path: Path) -> None:
    recipe = tmp_path / "dpo.toml"
    recipe.write_text('[data]\ndata_path = "pairs.jsonl"\n[train]\nobjective = "dpo"\n[preference]\nbeta = 0.2\n')
    ignored = ("train", "preference")
    assert load_recipe(PrepareConfig, [str(recipe)], ignore=ignored).data.kind_of_records == "preferences"
    other = [str(recipe), "--data.kind", "instruction"]
    assert load_recipe(PrepareConfig, other, ignore=ignored).data.kind_of_records == "instruction"


@pytest.mark.parametrize("objective", ["[]", "{}", "3", '"dop"'])
def test_an_objective_that_is_none_is_refused_by_its_key(tmp_path: Path, objective: str) -> None:
    recipe = tmp_path / "bad.toml"
    recipe.write_text(f'[model]\nmodel_name_or_path = "m"\n[data]\ndata_path = "d"\n[train]\nobjective = {objective}\n')
    with pytest.raises(ConfigError, match=r"train\.objective"):
        load_recipe(FinetuneConfig, [str(recipe)])
