"""Settings from grids, random draws and an Optuna that is a fake with a memory."""

import itertools
import math
from collections import Counter

import pytest

from llava_ray.config.finetune import FinetuneConfig
from llava_ray.config.space import SearchConfig, Space
from llava_ray.errors import ConfigError
from llava_ray.sweep.sampling import (
    Suggest,
    default_settings,
    draw_settings,
    is_inside,
    list_grid,
    list_points,
    list_settings,
    settings_key,
)

BASE = FinetuneConfig.parsed({"model": {"model_name_or_path": "m"}, "data": {"data_path": "d"}})
SPACE = Space.parsed(
    {
        "dimensions": {
            "model.mm_projector_type": {"choice": ["linear", "mlp2x_gelu"]},
            "lora.lora_enable": {"choice": [False, True]},
            "lora.lora_r": {"choice": [8, 64], "when": {"lora.lora_enable": [True]}},
            "train.learning_rate": {"log_uniform": [1e-4, 1e-2], "num_points": 3},
        }
    }
)


def test_a_grid_has_every_combination_and_no_setting_that_does_not_matter():
    found = list(list_grid(SPACE))
    assert len(found) == 2 * (1 + 2) * 3
    assert len({settings_key(settings) for settings in found}) == len(found)
    assert all(("lora.lora_r" in settings) == settings["lora.lora_enable"] for settings in found)
    assert list_points(SPACE.dimensions["train.learning_rate"]) == [1e-4, 1e-3, 1e-2]


def test_draws_repeat_by_seed_and_spread_as_declared():
    first = list(itertools.islice(draw_settings(SPACE, 3), 4000))
    assert first == list(itertools.islice(draw_settings(SPACE, 3), 4000))
    assert first != list(itertools.islice(draw_settings(SPACE, 4), 4000))
    rates = sorted(settings["train.learning_rate"] for settings in first)
    assert rates[0] >= 1e-4
    assert rates[-1] <= 1e-2
    assert math.log10(rates[2000]) == pytest.approx(-3, abs=0.05)
    assert Counter(settings["lora.lora_enable"] for settings in first)[True] == pytest.approx(2000, abs=120)
    assert all(("lora.lora_r" in settings) == settings["lora.lora_enable"] for settings in first)


def test_the_recipes_own_settings_come_first_and_once():
    own = default_settings(SPACE, BASE)
    assert own == {"model.mm_projector_type": "mlp2x_gelu", "lora.lora_enable": False, "train.learning_rate": 2e-5}
    found = list_settings(SPACE, SearchConfig(method="grid"), BASE)
    assert found[0] == own
    assert len(found) == 19
    inside = BASE.replaced({"train.learning_rate": 1e-3})
    assert len(list_settings(SPACE, SearchConfig(method="grid"), inside)) == 18
    assert len(list_settings(SPACE, SearchConfig(method="random", num_trials=7), BASE)) == 7
    without = SearchConfig(method="random", num_trials=7, include_default=False)
    assert not is_inside(SPACE, own)
    assert is_inside(SPACE, default_settings(SPACE, inside))
    assert settings_key(own) not in map(settings_key, list_settings(SPACE, without, BASE))


def test_more_draws_than_there_are_settings_are_refused():
    small = Space.parsed({"dimensions": {"model.mm_projector_type": {"choice": ["linear", "mlp2x_gelu"]}}})
    with pytest.raises(ConfigError, match="has only 2 different settings"):
        list_settings(small, SearchConfig(method="random", num_trials=3), BASE)


def test_equal_settings_are_one_however_they_are_written():
    assert settings_key({"a": 1, "b": (1, 2)}) == settings_key({"b": [1, 2], "a": 1.0})
    assert settings_key({"a": True}) != settings_key({"a": 1})


class FakeOptuna:
    """Suggests the middle, and remembers what it was asked."""

    def __init__(self, chosen: str) -> None:
        self.chosen = chosen
        self.asked: list[str] = []

    def suggest_float(self, name: str, low: float, high: float, *, log: bool) -> float:
        self.asked.append(name)
        return math.sqrt(low * high) if log else (low + high) / 2

    def suggest_categorical(self, name: str, choices: list[str]) -> str:
        self.asked.append(name)
        return next((choice for choice in choices if choice == self.chosen), choices[0])


@pytest.mark.parametrize(("chosen", "has_rank"), [("True", True), ("False", False)])
def test_optuna_is_asked_only_for_what_matters(chosen, has_rank):
    trial = FakeOptuna(chosen)
    settings = Suggest(SPACE)(trial)
    assert ("lora.lora_r" in trial.asked) == has_rank
    assert settings["lora.lora_enable"] is has_rank
    assert settings["train.learning_rate"] == 1e-3
