"""Tune's schedulers, chosen from a table, and one that remembers what was reported before the driver was killed.

Population-based training is not among them: it changes settings in the middle of a run, which no recipe could repeat.
"""

import math
from collections.abc import Callable
from typing import Any

from ray.tune.experiment import Trial as TuneTrial
from ray.tune.schedulers import (
    AsyncHyperBandScheduler,
    FIFOScheduler,
    MedianStoppingRule,
    TrialScheduler,
)

from llava_ray.config.space import SearchConfig
from llava_ray.sweep.ledger import read_ledger
from llava_ray.sweep.trials import LOWER_IS_BETTER

_STEP, _NUM_STEPS = "step", "num_steps"  # what schedulers count by: steps of the run, not reports
_BRACKETS = 3


def build_scheduler(search: SearchConfig, num_steps: int, grace_steps: int, folder: str) -> TrialScheduler:
    """Return the scheduler that a sweep asks for; ``folder`` is where its ledger lies."""
    goal = {"metric": search.stop_metric, "mode": "min" if LOWER_IS_BETTER[search.stop_metric] else "max"}
    return ReplayingScheduler(SCHEDULERS[search.scheduler](goal, search, num_steps, grace_steps), folder)


def asha(goal: dict[str, Any], search: SearchConfig, num_steps: int, grace_steps: int) -> TrialScheduler:
    """Return asynchronous successive halving."""
    return AsyncHyperBandScheduler(
        _STEP, **goal, max_t=num_steps, grace_period=grace_steps, reduction_factor=search.reduction_factor
    )


def _hyperband(goal: dict[str, Any], search: SearchConfig, num_steps: int, grace_steps: int) -> TrialScheduler:
    """Return asynchronous HyperBand: some trials meet their first rung later, should they start slowly."""
    return AsyncHyperBandScheduler(
        _STEP,
        **goal,
        max_t=num_steps,
        grace_period=grace_steps,
        reduction_factor=search.reduction_factor,
        brackets=_BRACKETS,
    )


def _median(goal: dict[str, Any], search: SearchConfig, num_steps: int, grace_steps: int) -> TrialScheduler:
    """Return the rule that stops what is worse than the others' mean so far, at the median."""
    del search, num_steps
    # Left alone it pauses trials so that waiting ones can catch up: a run would be torn down and started again.
    return MedianStoppingRule(
        _STEP,
        **goal,
        grace_period=grace_steps,
        min_samples_required=2,
        min_time_slice=math.inf,
    )


def _first_come(goal: dict[str, Any], search: SearchConfig, num_steps: int, grace_steps: int) -> TrialScheduler:
    """Return a scheduler that stops nothing."""
    del goal, search, num_steps, grace_steps
    return FIFOScheduler()


SCHEDULERS: dict[str, Callable[[dict[str, Any], SearchConfig, int, int], TrialScheduler]] = {
    "asha": asha,
    "hyperband": _hyperband,
    "median": _median,
    "halving": _first_come,  # within a round; see rounds.py
    "none": _first_come,
}


class ReplayingScheduler(TrialScheduler):
    """Another scheduler that is told, of each trial Tune adds, what the ledger knows of it.

    Tune restores its trials after a kill, but not what the scheduler had learnt from them: without this, the first
    trial after it would be judged as if there had been no other.
    """

    def __init__(self, scheduler: TrialScheduler, folder: str) -> None:
        """Wrap ``scheduler``; the ledger in ``folder`` is read when the first trial is added, not now."""
        super().__init__()
        self.scheduler = scheduler
        self.folder = folder
        self.known: dict[str, list[dict[str, Any]]] | None = None

    def replayed_reports(self, name: str) -> list[dict[str, Any]]:
        """Return what the ledger knew of a trial when this process started."""
        if self.known is None:
            self.known = {trial.id: [look.to_report() for look in trial.curve] for trial in read_ledger(self.folder)}
        return self.known.get(name, [])

    def on_trial_add(self, tune_controller: Any, trial: TuneTrial) -> None:
        """Add the trial, and tell what it had reported; what was decided of that then is done."""
        self.scheduler.on_trial_add(tune_controller, trial)
        for report in self.replayed_reports(trial.trial_id):
            self.scheduler.on_trial_result(tune_controller, trial, report)
        if isinstance(self.scheduler, MedianStoppingRule):
            self.scheduler._stopped_trials.discard(trial)  # it asserts that what it has stopped never reports again

    def on_trial_result(self, tune_controller: Any, trial: TuneTrial, result: dict[str, Any]) -> str:
        """Decide, unless the trial is at its end anyway, or this is only repeated after a restart.

        A trial that is stopped at its last step could not write its model any more.
        """
        repeated = any(report[_STEP] == result.get(_STEP) for report in self.replayed_reports(trial.trial_id))
        if repeated or result.get(_STEP, 0) >= result.get(_NUM_STEPS, math.inf):
            return str(TrialScheduler.CONTINUE)
        return str(self.scheduler.on_trial_result(tune_controller, trial, result))

    def on_trial_error(self, tune_controller: Any, trial: TuneTrial) -> None:
        """Pass on."""
        self.scheduler.on_trial_error(tune_controller, trial)

    def on_trial_complete(self, tune_controller: Any, trial: TuneTrial, result: dict[str, Any]) -> None:
        """Pass on, unless the trial ended without anything to judge it by."""
        metric = self.scheduler.metric
        if metric is None or metric in result:
            self.scheduler.on_trial_complete(tune_controller, trial, result)

    def on_trial_remove(self, tune_controller: Any, trial: TuneTrial) -> None:
        """Pass on."""
        self.scheduler.on_trial_remove(tune_controller, trial)

    def choose_trial_to_run(self, tune_controller: Any) -> TuneTrial | None:
        """Pass on."""
        return self.scheduler.choose_trial_to_run(tune_controller)

    def debug_string(self) -> str:
        """Pass on."""
        return str(self.scheduler.debug_string())

    @property
    def metric(self) -> str | None:
        """Return what the scheduler looks at."""
        return self.scheduler.metric

    @property
    def supports_buffered_results(self) -> bool:
        """Return that every report is looked at when it comes."""
        return False
