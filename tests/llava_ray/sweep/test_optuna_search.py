"""Optuna itself over a space, without Ray's processes."""

import pytest

from llava_ray.config.space import Space, SweepConfig

pytest.importorskip("optuna")

from llava_ray.sweep.searching import build_optuna, list_trial_arguments

SPACE = Space.parsed(
    {
        "dimensions": {
            "train.learning_rate": {"log_uniform": [1e-5, 1e-1]},
            "model.mm_vision_select_layer": {"choice": [-2, [-2, -5]]},
        }
    }
)


def config_of(**search: object) -> SweepConfig:
    return SweepConfig.parsed(
        {
            "model": {"model_name_or_path": "m"},
            "data": {"data_path": "d"},
            "held_out": {"path": "h"},
            "sweep": {"method": "optuna", **search},
        }
    )


def test_it_learns_from_what_ended_and_goes_on_after_a_restart(tmp_path):
    config = config_of()
    searcher = build_optuna(SPACE, config.sweep, config.base)
    first = searcher.suggest("t0")
    assert first == {"train.learning_rate": 2e-5, "model.mm_vision_select_layer": -2}  # the recipe's own
    searcher.on_trial_complete("t0", {"held_out_accuracy": 0.1})
    for number in range(1, 40):
        name = f"t{number}"
        settings = searcher.suggest(name)
        assert settings["model.mm_vision_select_layer"] in (-2, [-2, -5])
        searcher.on_trial_result(name, {"ended": "finished"})  # no metric: not taken
        near = 1 - abs(settings["train.learning_rate"] - 1e-3)
        searcher.on_trial_complete(name, {"held_out_accuracy": near} if number % 5 else {"ended": "diverged"})
    searcher.save(str(tmp_path / "state"))
    again = build_optuna(SPACE, config.sweep, config.base)
    again.restore(str(tmp_path / "state"))
    late = [again.suggest(f"late{number}")["train.learning_rate"] for number in range(10)]
    assert late == [searcher.suggest(f"late{number}")["train.learning_rate"] for number in range(10)]
    assert sum(rate < 1e-2 for rate in late) >= 8


def test_cost_is_a_second_objective():
    config = config_of(weigh_cost=True)
    searcher = build_optuna(SPACE, config.sweep, config.base)
    searcher.suggest("a")
    searcher.on_trial_result("a", {"ended": "finished"})
    searcher.on_trial_complete("a", {"held_out_accuracy": 0.5, "time_total_s": 10.0})
    assert searcher._ot_study.trials[0].values == [0.5, 10.0]


def test_seeds_of_a_setting_stand_together():
    config = config_of(method="random", num_trials=3, num_seeds=2)
    given = list_trial_arguments(SPACE, config.sweep, config.base)
    assert [row["seed"] for row in given] == [42, 43] * 3
    assert given[0]["settings"] == given[1]["settings"] != given[2]["settings"]
