"""The sources of a mixture in recipes and flags: what is refused, by which key, and what stays as it was."""

import json
from pathlib import Path

import pytest

from llava_ray.config.data import DataConfig
from llava_ray.config.finetune import FinetuneConfig, PrepareConfig
from llava_ray.config.held_out import is_higher_better
from llava_ray.config.mixtures import named_places, source_data
from llava_ray.config.recipes import differing_keys, load_recipe, settings_hash
from llava_ray.config.space import SweepConfig
from llava_ray.errors import ConfigError

MODEL = '[model]\nmodel_name_or_path = "lm"\nvision_tower = "clip"\n'
A = '[[data.sources]]\nname = "a"\ndata_path = "a.json"\nweight = 1\n'
B = '[[data.sources]]\nname = "b"\ndata_path = "b.json"\nweight = 0.5\n'


@pytest.fixture
def load(tmp_path: Path):
    """Load a recipe with this text below its model."""

    def load(text: str, *flags: str) -> FinetuneConfig:
        path = tmp_path / "mixed.toml"
        path.write_text(MODEL + text)
        return load_recipe(FinetuneConfig, [str(path), *flags])

    return load


def test_sources_take_the_place_of_a_data_path(load):
    config = load(A + B)
    assert [(source.name, source.weight) for source in config.data.sources] == [("a", 1.0), ("b", 0.5)]
    assert list(named_places(config.data))[:3] == [
        "data.image_folder",
        "data.sources.0.data_path",
        "data.sources.0.image_folder",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (A.replace("= 1", "= 0") + B, r"'data.sources.0.weight' = 0: Input should be greater than 0"),
        (A + B.replace("0.5", "-2"), r"'data.sources.1.weight' = -2: Input should be greater than 0"),
        (A + B.replace("0.5", "nan"), r"'data.sources.1.weight' = nan"),
        (A + "epochs = 2\n", r"'data.sources.0' = .*: weight and epochs given; expected one of weight, epochs, sam"),
        (A + B + "epochs = 2\nsamples = 3\n", r"'data.sources.1' = .*: weight and epochs and samples given"),
        (A.replace("weight = 1\n", ""), r"'data.sources.0' = .*: none given; expected one of weight, epochs, samples"),
        (A.replace("weight = 1", "epochs = 0"), r"'data.sources.0.epochs' = 0: Input should be greater than 0"),
        (A.replace("weight = 1", "samples = 1.5"), r"'data.sources.0.samples' = 1.5"),
        (A + B.replace('"b"', '"a"'), r"data.sources.0 and data.sources.1 are both named 'a'"),
        (A.replace('"a"', '"a/b"'), r"'data.sources.0.name' = 'a/b': String should match"),
        (A.replace('name = "a"\n', ""), r"'data.sources.0.name' is required"),
        (A.replace("a.json", ""), r"'data.sources.0.data_path' = ''"),
        (A + "wieght = 2\n", r"unknown key 'data.sources.0.wieght'; did you mean 'weight'"),
        (A + "on_to_long = 'split'\n", r"unknown key 'data.sources.0.on_to_long'; did you mean 'on_too_long'"),
        (A + "kind = 'preferences'\n", r"data.sources.0 \(a\): kind = 'preferences' with train.objective = 'cross_ent"),
        (A + "kind = 'pairs'\n", r"'data.sources.0.kind' = 'pairs'"),
        (A + "model_max_length = 4096\n", r"data.sources.0 \(a\): model_max_length = 4096 is above train.model_max_le"),
        (A + "held_out_images = 'x'\n", r"held_out_images has no effect without held_out"),
        ("[data]\nmax_samples = 3\n" + A, r"max_samples has no effect with sources: set it in each source"),
        ("[data]\ndata_path = 'x'\n" + A, r"data_path and sources are both given"),
        ("[data]\nepoch_samples = 9\n" + A.replace("weight = 1", "epochs = 1"), r"epoch_samples has no effect without"),
        ("[data]\ndata_path = 'x'\nepoch_samples = 9\n", r"epoch_samples has no effect without data.sources"),
        ("[data]\nsources = 3\n", r"'data.sources' = 3"),
        ("[data]\nsources = [3]\n", r"'data.sources.0' = 3"),
    ],
)
def test_faults_of_sources_name_the_source_and_the_recipe(load, text, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load(text)
    assert "mixed.toml" in str(caught.value)


def test_sources_are_given_as_json_too_and_win_over_the_recipe(load):
    sources = [{"name": "q", "data_path": "q.json", "samples": 4}]
    for flags in (["--data.sources", json.dumps(sources)], [f"--data.sources={json.dumps(sources)}"]):
        for text in ("", A + B):
            config = load(text, *flags, "--train.seed", "3")
            assert [source.model_dump(exclude_defaults=True) for source in config.data.sources] == sources
            assert config.train.seed == 3


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data.sources", "mix.json"], r"--data.sources 'mix.json' is no JSON .*give a list of tables, such as"),
        (["--data.sources", '{"name": "a"}'], r"--data.sources .*: give a list of tables"),
        (["--data.sources", "[" * 20000], r"--data.sources .* is no JSON"),
        (["--data.sources"], r"--data.sources needs a value"),
        (["--data.sources", '[{"name": "a", "data_path": "a", "weight": 0}]'], r"flags: 'data.sources.0.weight' = 0"),
        ([], r"--data.data_path"),
    ],
)
def test_faults_of_the_flag_are_told(load, flags, message):
    with pytest.raises(ConfigError, match=message):
        load("", *flags)


def test_help_lists_the_flag(load, capsys):
    with pytest.raises(SystemExit):
        load(A, "--help")
    assert "--data.sources JSON" in capsys.readouterr().out


def test_preparation_takes_the_same_recipe(tmp_path):
    path = tmp_path / "mixed.toml"
    path.write_text(MODEL + A + B)
    assert len(load_recipe(PrepareConfig, [str(path)], ignore=("model",)).data.sources) == 2


def test_a_source_is_prepared_as_if_it_were_alone(load):
    data = load(
        "[data]\nimage_folder = 'i'\non_too_long = 'split'\n" + A + B + "max_samples = 5\nimage_folder = 'j'\n"
    ).data
    first, second = source_data(data, 0), source_data(data, 1)
    assert (first.data_path, first.image_folder, first.on_too_long, first.sources) == ("a.json", "i", "split", ())
    assert (second.image_folder, second.max_samples) == ("j", 5)
    assert first == DataConfig(data_path="a.json", image_folder="i", on_too_long="split")


def test_names_and_hashes_of_runs_without_sources_are_those_they_had(load):
    # As version 7b0bc92 computed them.
    config = load("[data]\ndata_path = 'x'\n")
    assert settings_hash(config) == "89bc066e"
    assert settings_hash(load("[data]\ndata_path = 'x'\n[held_out]\npath = 'h'\nnum_answers = 3\n")) == "89bc066e"


def test_what_is_only_looked_at_is_no_other_setting_and_what_selects_a_model_is(load):
    plain, looked = load(A + B), load(A + B + "held_out = 'h'\n")
    assert settings_hash(plain) == settings_hash(looked)
    assert differing_keys(plain.model_dump(mode="json"), looked.model_dump(mode="json")) == []
    best = load(A + B + "held_out = 'h'\n[held_out]\nkeep_best = true\n")
    assert settings_hash(best) != settings_hash(plain)
    assert differing_keys(plain.model_dump(), best.model_dump()) == ["held_out.keep_best: None -> True"]
    other = load(A + B.replace("0.5", "2"))
    assert differing_keys(plain.model_dump(mode="json"), other.model_dump(mode="json")) == [
        "data.sources.1.weight: 0.5 -> 2.0"
    ]


@pytest.mark.parametrize(
    ("metric", "higher"),
    [
        ("held_out_loss", False),
        ("held_out_loss/margin", False),
        ("held_out_accuracy/a", True),
        ("held_out_rewards_margin", True),
        ("held_out_kl", False),
    ],
)
def test_the_better_direction_of_a_score_is_known_by_its_name(metric, higher):
    assert is_higher_better(metric) is higher


SELECTING = "[held_out]\nkeep_best = true\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (A + SELECTING, r"need held-out samples: set held_out.path, or held_out of a source"),
        (A + "[held_out]\npath = 'h'\nmetric = 'held_out_accuracy'\n", r"held_out.metric has no effect without"),
        (A + "[held_out]\npath = 'h'\nearly_stopping_min_delta = 0.1\n", r"early_stopping_min_delta has no effect"),
        (A + SELECTING + "path = 'h'\nmetric = 'loss'\n", r"held_out.metric = 'loss': expected one such as held_out_l"),
        (A + SELECTING + "path = 'h'\nmetric = 'held_out_loss/a'\n", r"expected one such as held_out_loss, held_out_a"),
        (A + SELECTING + "path = 'h'\nmetric = 'held_out_rewards_rejected'\n", r"which direction is better is not kno"),
        (A + SELECTING + "path = 'h'\nmetric = 'held_out_speed'\n", r"which direction is better is not known"),
        (A + SELECTING + "path = 'h'\nnum_answers = 0\nmetric = 'held_out_accuracy'\n", r"needs answers"),
        (A + "[held_out]\npath = 'h'\nearly_stopping_patience = 0\n", r"'held_out.early_stopping_patience' = 0"),
    ],
)
def test_scores_that_no_evaluation_has_are_refused(load, text, message):
    with pytest.raises(ConfigError, match=message):
        load(text)


def test_a_sweep_keeps_its_own_best(load):
    config = load(A + SELECTING + "path = 'h'\n")
    with pytest.raises(ConfigError, match=r"leave held_out.early_stopping_patience and held_out.keep_best out"):
        SweepConfig.parsed(config.model_dump())
