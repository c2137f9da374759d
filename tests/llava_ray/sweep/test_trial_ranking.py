"""Which trial is the best, what it beats, what mattered, what to try next: all on invented trials."""

import math
import random

import pytest

from llava_ray.config.space import SearchConfig, Space
from llava_ray.sweep.advice import advise
from llava_ray.sweep.importance import compute_importance
from llava_ray.sweep.table import format_table
from llava_ray.sweep.trial_ranking import (
    compare_with_default,
    compute_saved_share,
    find_common_step,
    pareto_front,
    rank_trials,
)
from llava_ray.sweep.trials import ACCURACY, LOSS, Evaluation, Trial, TrialState

KIND, RATE = "model.mm_projector_type", "train.learning_rate"
SPACE = Space.parsed(
    {
        "dimensions": {
            KIND: {"choice": ["linear", "mlp2x_gelu"]},
            RATE: {"choice": [1e-4, 1e-3, 1e-2, 1e-1]},
        }
    }
)


def trial(number: int, kind: str, rate: float, losses: list[float], state: TrialState = "finished", **more) -> Trial:
    """A trial seen every ten steps, as accurate as its loss is low."""
    curve = [Evaluation(10 * i, loss, max(0.0, 1 - loss)) for i, loss in enumerate(losses, start=1)]
    values = {"seed": 0, "seconds": 10.0 * len(losses)} | more
    return Trial(f"t{number}", number, {KIND: kind, RATE: rate}, state=state, curve=curve, **values)


def test_the_best_is_one_that_came_to_its_end():
    trials = [
        trial(1, "linear", 1e-3, [0.9, 0.5]),
        trial(2, "linear", 1e-2, [0.1], state="stopped"),
        trial(3, "mlp2x_gelu", 1e-3, [0.8, 0.4]),
        trial(4, "mlp2x_gelu", 1e-1, [], state="diverged"),
    ]
    assert [one.trials[0].number for one in rank_trials(trials, ACCURACY)] == [3, 1]
    assert compute_saved_share(trials, 20) == pytest.approx(1 - 50 / 80)
    assert find_common_step(trials) == 10


def test_seeds_of_a_setting_are_judged_by_their_mean_and_only_together():
    steady = [trial(i, "linear", 1e-3, [0.5], seed=i) for i in (1, 2)]
    lucky = [trial(3, "linear", 1e-2, [0.2]), trial(4, "linear", 1e-2, [1.0], seed=1)]
    ranked = rank_trials([*steady, *lucky], LOSS)
    assert [one.loss for one in ranked] == [0.5, 0.6]
    assert len(ranked[0].trials) == 2
    half = [*steady, trial(3, "linear", 1e-2, [0.2]), trial(4, "linear", 1e-2, [0.3], state="failed", seed=1)]
    assert [one.trials[0].number for one in rank_trials(half, LOSS)] == [1]


def test_equals_in_accuracy_are_told_apart_by_their_loss():
    first, second = trial(1, "linear", 1e-3, [2.0]), trial(2, "linear", 1e-2, [1.5])
    assert [one.trials[0].number for one in rank_trials([first, second], ACCURACY)] == [2, 1]


def test_a_loss_that_is_not_a_number_is_never_the_best():
    assert [
        one.trials[0].number
        for one in rank_trials([trial(1, "linear", 1, [math.nan]), trial(2, "linear", 2, [5])], LOSS)
    ] == [
        2,
        1,
    ]


def test_what_no_other_beats_in_quality_and_cost():
    dear = trial(1, "linear", 1e-3, [0.2], seconds=100)
    cheap = trial(2, "linear", 1e-2, [0.4], seconds=10)
    worse = trial(3, "mlp2x_gelu", 1e-3, [0.5], seconds=50)
    found = pareto_front(rank_trials([dear, cheap, worse], LOSS), LOSS)
    assert [one.trials[0].number for one in found] == [2, 1]


@pytest.mark.parametrize(
    ("own", "better", "said"),
    [
        (trial(2, "linear", 1e-2, [0.9, 0.8]), True, "beats the recipe's own settings (trial 2, finished) at step 20"),
        (trial(2, "linear", 1e-2, [0.9], state="stopped"), True, "(trial 2, stopped) at step 10"),
        (trial(2, "linear", 1e-2, [0.1], state="stopped"), False, "does not beat"),
        (trial(2, "linear", 1e-2, [], state="diverged"), True, "ended as diverged"),
    ],
)
def test_the_best_is_compared_with_the_recipes_own_at_a_step_both_were_seen_at(own, better, said):
    trials = [trial(1, "linear", 1e-3, [0.7, 0.5]), own]
    found = compare_with_default(rank_trials(trials[:1], ACCURACY)[0], trials, {KIND: "linear", RATE: 1e-2}, ACCURACY)
    assert found.better is better
    assert said in found.text


def test_a_best_that_is_the_recipes_own_says_so():
    trials = [trial(1, "linear", 1e-2, [0.5])]
    found = compare_with_default(rank_trials(trials, LOSS)[0], trials, {RATE: 0.01, KIND: "linear"}, LOSS)
    assert not found.better
    assert "nothing that was tried beats them" in found.text


def test_a_setting_that_decides_explains_all_and_one_that_does_not_nothing():
    rates = [1e-4, 1e-3, 1e-2, 1e-1]
    trials = [
        trial(2 * i + j, kind, rate, [abs(math.log10(rate) + 2) + 0.001 * j])
        for i, rate in enumerate(rates)
        for j, kind in enumerate(["linear", "mlp2x_gelu"])
    ]
    shares = compute_importance(trials, SPACE)
    assert shares[RATE] > 0.7
    assert shares[KIND] < 0.2
    by_kind = [trial(t.number, t.settings[KIND], t.settings[RATE], [1.0 if t.number % 2 else 0.5]) for t in trials]
    assert compute_importance(by_kind, SPACE)[KIND] == pytest.approx(1)
    assert compute_importance(trials[:3], SPACE) == {}


def test_chance_explains_nothing():
    draw = random.Random(0)
    shares = [
        compute_importance([trial(i, "linear", 10.0 ** -(i % 4), [draw.random()]) for i in range(8)], SPACE)[RATE]
        for _ in range(200)
    ]
    # Never below zero, so a little on average; without the adjustment it would be 0.43.
    assert sum(shares) / len(shares) < 0.3


def test_advice_names_the_end_of_the_space_the_diverged_and_the_idle():
    trials = [
        trial(1, "linear", 1e-4, [0.1]),
        trial(2, "linear", 1e-3, [0.5]),
        trial(3, "linear", 1e-1, [], state="diverged"),
        trial(4, "mlp2x_gelu", 1e-3, [], state="failed", reason="DataError: no"),
    ]
    shares = {KIND: 0.01, RATE: 0.9}
    few = " ".join(advise(trials, rank_trials(trials, ACCURACY), SPACE, SearchConfig(), shares, 1000))
    assert "hardly any difference" not in few
    trials += [trial(number, "linear", 1e-3, [0.6]) for number in range(5, 15)]
    said = " ".join(advise(trials, rank_trials(trials, ACCURACY), SPACE, SearchConfig(), shares, 1000))
    assert "learning_rate, 0.0001, is at the lower end" in said
    assert "Trials 3 diverged" in said
    assert "1 trials failed" in said
    assert f"{KIND} made hardly any difference" in said


def test_a_lead_within_chance_is_called_that():
    trials = [trial(1, "linear", 1e-3, [0.10]), trial(2, "linear", 1e-2, [0.11])]
    said = " ".join(advise(trials, rank_trials(trials, ACCURACY), SPACE, SearchConfig(), {}, 100))
    assert "within chance of the best" in said
    alone = " ".join(advise(trials, rank_trials(trials, ACCURACY), SPACE, SearchConfig(), {}, 100_000))
    assert "within chance" not in alone


def test_the_table_shows_each_trial_as_what_it_is():
    trials = [
        trial(1, "linear", 1e-3, [0.5, 0.25]),
        trial(2, "linear", 1e-2, [0.75], state="stopped"),
        trial(3, "linear", 1e-1, [], state="diverged", reason="step 3: the loss is nan"),
        trial(4, "linear", 1.0, [], state="failed", reason="DataError: every row is too long"),
    ]
    header, *lines = format_table(trials, 20)
    assert "mm_projector_type" in header
    assert "20/20" in lines[0]
    assert "75.0%" in lines[0]
    assert lines[0].endswith("done")
    assert lines[1].endswith("stopped early")
    assert lines[2].endswith("diverged: step 3: the loss is nan")
    assert lines[3].endswith("failed: DataError: every row is too long")
    assert all(len(line) <= 40 for line in format_table(trials, 20, width=40))
