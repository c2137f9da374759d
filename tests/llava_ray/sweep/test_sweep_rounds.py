"""Successive halving: how far each round goes, who goes on, and that a kill in between changes nothing."""

import pytest

from llava_ray.config.space import SearchConfig
from llava_ray.sweep.rounds import Round, find_eliminated, is_round_complete, plan_rounds
from llava_ray.sweep.trials import LOSS, Evaluation, Trial, TrialState

HALVING = SearchConfig(scheduler="halving")


def trial(
    number: int, loss: float, *, rate: float | None = None, state: TrialState = "waiting", step: int = 10
) -> Trial:
    curve = [Evaluation(step, loss)] if loss >= 0 else []
    return Trial(f"t{number}", number, {"train.learning_rate": rate or number}, 0, state, curve=curve)


def names(trials: list[Trial]) -> list[str]:
    return sorted(trial.id for trial in trials)


def test_eight_trials_take_a_bit_less_than_a_third_of_their_steps():
    rounds = plan_rounds(HALVING, 80, 10)
    assert rounds == [Round(10, 0.5), Round(20, 0.25), Round(40, 0.125), Round(80, 1.0)]
    running = [8, 4, 2, 1]
    assert sum(n * steps for n, steps in zip(running, [10, 10, 20, 40], strict=True)) == 200


def test_the_last_round_is_the_whole_run_wherever_the_others_end():
    assert [one.until for one in plan_rounds(HALVING, 100, 30)] == [30, 60, 100]
    assert [one.until for one in plan_rounds(HALVING, 20, 20)] == [20]
    assert plan_rounds(SearchConfig(scheduler="asha"), 80, 10) == [Round(80, 1.0)]


def test_the_better_half_goes_on():
    trials = [trial(number, loss) for number, loss in enumerate([0.5, 0.9, 0.4, float("nan"), 0.6], start=1)]
    assert names(find_eliminated(trials, Round(10, 0.5), LOSS)) == ["t2", "t4", "t5"]


def test_one_always_goes_on():
    assert names(find_eliminated([trial(1, 0.5), trial(2, 0.4)], Round(10, 0.125), LOSS)) == ["t1"]


def test_those_that_failed_make_no_room_for_more_to_be_dropped():
    trials = [trial(1, 0.5), trial(2, -1, state="failed"), trial(3, 0.4), trial(4, 0.6, state="diverged")]
    assert find_eliminated(trials, Round(10, 0.5), LOSS) == []


def test_a_setting_goes_on_with_all_its_seeds_by_their_mean():
    trials = [trial(1, 0.1, rate=1e-2), trial(2, 0.9, rate=1e-2), trial(3, 0.3, rate=1e-3), trial(4, 0.4, rate=1e-3)]
    assert names(find_eliminated(trials, Round(10, 0.5), LOSS)) == ["t1", "t2"]


def test_a_driver_killed_while_it_told_them_tells_the_rest():
    this = Round(10, 0.5)
    trials = [trial(number, number / 10) for number in range(1, 9)]
    told = find_eliminated(trials, this, LOSS)
    told[0].state = "stopped"
    assert names(find_eliminated(trials, this, LOSS)) == names(told[1:])


@pytest.mark.parametrize(
    ("state", "step", "over"),
    [
        ("waiting", 10, True),
        ("running", 10, False),  # its run has not said that it is done
        ("running", 20, True),  # interrupted in a later round
        ("stopped", 5, True),
        ("running", 5, False),
    ],
)
def test_a_round_is_over_when_all_have_come_to_its_end(state, step, over):
    trials = [trial(1, 0.5), trial(2, 0.5, state=state, step=step)]
    assert is_round_complete(trials, 10, 2) is over
    assert not is_round_complete(trials, 10, 3)
