"""Tune's own schedulers as a sweep uses them: whom they stop, and that a restart changes nothing of it."""

import pytest
from ray.tune.experiment import Trial as TuneTrial
from ray.tune.schedulers import TrialScheduler

from llava_ray.config.space import SearchConfig
from llava_ray.sweep.ledger import TrialLedger
from llava_ray.sweep.schedulers import SCHEDULERS, build_scheduler
from llava_ray.sweep.trials import Evaluation

STEPS = [10, 20, 40, 80]
NUM_STEPS = 80


class StubTrial(TuneTrial):
    """A trial as far as schedulers look at it."""

    def __init__(self, name: str) -> None:
        self.trial_id = name

    def __str__(self) -> str:
        return self.trial_id

    __repr__ = __str__


def report(step: int, loss: float) -> dict[str, float]:
    return {"step": step, "num_steps": NUM_STEPS, "held_out_loss": loss}


def sweep(
    scheduler: TrialScheduler, losses: dict[str, float], ledger: TrialLedger | None = None
) -> dict[str, tuple[int, bool]]:
    """Run trials one after the other; return the step at which each ended, and whether it was stopped."""
    ended = {}
    for name, loss in losses.items():
        trial = StubTrial(name)
        scheduler.on_trial_add(None, trial)
        if ledger:
            ledger.start(name, {}, 0)
        for step in STEPS:
            if ledger:
                ledger.add_evaluation(name, Evaluation(step, loss))
            stopped = scheduler.on_trial_result(None, trial, report(step, loss)) == TrialScheduler.STOP
            ended[name] = (step, stopped)
            if stopped:
                break
        scheduler.on_trial_complete(None, trial, report(ended[name][0], loss))
    return ended


LOSSES = {f"t{i}": loss for i, loss in enumerate([0.5, 0.9, 0.8, 0.4, 0.7, 0.6, 0.3, 1.0])}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_best_always_reaches_its_end_and_is_left_to_finish(name, tmp_path):
    scheduler = build_scheduler(SearchConfig(scheduler=name), NUM_STEPS, 10, str(tmp_path))
    ended = sweep(scheduler, LOSSES)
    assert ended["t6"] == (NUM_STEPS, False)
    assert not any(stopped for step, stopped in ended.values() if step == NUM_STEPS)
    total = sum(step for step, _ in ended.values())
    if name == "none":
        assert total == NUM_STEPS * len(LOSSES)
    if name == "asha":
        assert total < NUM_STEPS * len(LOSSES) / 2


def test_a_restart_changes_no_decision(tmp_path):
    whole = sweep(build_scheduler(SearchConfig(), NUM_STEPS, 10, str(tmp_path)), LOSSES)
    first = dict(list(LOSSES.items())[:4])
    folder = tmp_path / "killed"
    sweep(build_scheduler(SearchConfig(), NUM_STEPS, 10, str(folder)), first, TrialLedger(str(folder)))
    again = build_scheduler(SearchConfig(), NUM_STEPS, 10, str(folder))
    for name in first:
        again.on_trial_add(None, StubTrial(name))
    rest = {name: loss for name, loss in LOSSES.items() if name not in first}
    assert {**{name: whole[name] for name in first}, **sweep(again, rest)} == whole


@pytest.mark.parametrize("name", SCHEDULERS)
def test_what_is_only_repeated_after_a_restart_stops_nothing(name, tmp_path):
    ledger = TrialLedger(str(tmp_path))
    for trial in ("good", "better"):
        ledger.start(trial, {}, 0)
        ledger.add_evaluation(trial, Evaluation(10, 0.1))
    ledger.start("bad", {}, 0)
    ledger.add_evaluation("bad", Evaluation(10, 9.0))
    again = build_scheduler(SearchConfig(scheduler=name), NUM_STEPS, 10, str(tmp_path))
    trials = {trial: StubTrial(trial) for trial in ("good", "better", "bad")}
    for trial in trials.values():
        again.on_trial_add(None, trial)
    assert again.on_trial_result(None, trials["bad"], report(10, 9.0)) == TrialScheduler.CONTINUE
    decision = again.on_trial_result(None, trials["bad"], report(20, 9.0))
    assert decision in (TrialScheduler.CONTINUE, TrialScheduler.STOP)


def test_a_report_that_only_says_how_a_trial_ended_is_no_result(tmp_path):
    scheduler = build_scheduler(SearchConfig(), NUM_STEPS, 10, str(tmp_path))
    trial = StubTrial("a")
    scheduler.on_trial_add(None, trial)
    assert scheduler.on_trial_result(None, trial, {"ended": "diverged"}) == TrialScheduler.CONTINUE
    scheduler.on_trial_complete(None, trial, {"ended": "diverged"})
