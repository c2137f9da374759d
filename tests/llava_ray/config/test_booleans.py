"""Switches on the command line: yes and no in every spelling, never a guess."""

import pytest

from llava_ray.config.booleans import find_boolean_parameters, strip_boolean_values, write_out_booleans
from llava_ray.config.chat import ChatSettings
from llava_ray.config.finetune import FinetuneConfig
from llava_ray.config.recipes import load_recipe
from llava_ray.errors import ConfigError
from pipelines.export import SUBCOMMANDS

NEEDED = ["--model.model_name_or_path", "lm", "--data.data_path", "x"]
ON, OFF = ("true", "True", "TRUE", "yes", "Yes", "1", "on", " true "), ("false", "FALSE", "no", "NO", "0", "off", "Off")


@pytest.mark.parametrize(("word", "expected"), [*((word, True) for word in ON), *((word, False) for word in OFF)])
def test_every_spelling_of_yes_and_no_is_understood(word, expected):
    assert write_out_booleans(FinetuneConfig, ["--train.tf32", word]) == ["--train.tf32", str(expected)]
    assert write_out_booleans(FinetuneConfig, [f"--train.tf32={word}"]) == [f"--train.tf32={expected}"]


def test_a_switch_without_a_value_is_on():
    flags = ["--tune_mm_mlp_adapter", *NEEDED, "--train.tf32", "no", "--train.offload_optimizer"]
    config = load_recipe(FinetuneConfig, flags)
    assert config.model.tune_mm_mlp_adapter
    assert config.train.offload_optimizer
    assert not config.train.tf32


def test_a_switch_that_may_be_something_else_takes_that_too():
    for word, expected in (("AUTO", "auto"), ("No", "False"), ("1", "True")):
        assert write_out_booleans(FinetuneConfig, ["--cluster.use_gpu", word])[1] == expected
    for word, expected in (("none", "None"), ("NULL", "None"), ("yes", "True")):
        assert write_out_booleans(FinetuneConfig, ["--data.lazy_preprocess", word])[1] == expected
    config = load_recipe(FinetuneConfig, [*NEEDED, "--cluster.use_gpu", "Auto", "--data.lazy_preprocess", "none"])
    assert (config.cluster.use_gpu, config.data.lazy_preprocess) == ("auto", None)


@pytest.mark.parametrize("word", ["maybe", "2", "", "tru", "none", "auto"])
def test_anything_else_is_refused_by_key(word):
    with pytest.raises(ConfigError, match=r"'train\.tf32' = .*expected true or false"):
        load_recipe(FinetuneConfig, [*NEEDED, f"--train.tf32={word}"])


def test_values_of_other_settings_are_left_as_they_are(tmp_path):
    assert write_out_booleans(FinetuneConfig, ["--run.name", "yes", "--train.seed", "1", "stray"]) == [
        *["--run.name", "yes", "--train.seed", "1", "stray"]
    ]
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('[model]\nmodel_name_or_path = "lm"\n[data]\ndata_path = "x"\n[train]\nbf16 = "No"\ntf32 = 0\n')
    train = load_recipe(FinetuneConfig, [str(recipe)]).train
    assert (train.bf16, train.tf32) == (False, False)


def test_switches_that_take_no_value_understand_one():
    names = find_boolean_parameters(ChatSettings, *SUBCOMMANDS.values())
    assert {"json", "approximate", "transformers_only"} <= names
    assert strip_boolean_values(["m", "--json", "Yes", "--prompt", "no"], names) == ["m", "--json", "--prompt", "no"]
    assert strip_boolean_values(["m", "--json=0", "--transformers-only"], names) == [
        "m",
        "--no-json",
        "--transformers-only",
    ]
    assert strip_boolean_values(["inspect", "--json", "folder"], names) == ["inspect", "--json", "folder"]
    with pytest.raises(ConfigError, match=r"--json = 'maybe': expected true or false"):
        strip_boolean_values(["m", "--json=maybe"], names)
