"""Tune's schedulers in a table, and a wrapper that replays reports from before a kill of the driver.

Population-based training is excluded: it changes settings during a run, which no recipe could reproduce.
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

_STEP, _NUM_STEPS = "step", "num_steps"  # the time attribute of schedulers: steps of the run, not reports
_BRACKETS = 3


def build_scheduler(search: SearchConfig, num_steps: int, grace_steps: int, folder: str) -> TrialScheduler:
    """Build the scheduler of a sweep; ``folder`` holds its ledger."""
    goal = {"metric": search.stop_metric, "mode": "min" if LOWER_IS_BETTER[search.stop_metric] else "max"}
    return ReplayingScheduler(SCHEDULERS[search.scheduler](goal, search, num_steps, grace_steps), folder)


def asha(goal: dict[str, Any], search: SearchConfig, num_steps: int, grace_steps: int) -> TrialScheduler:
    """Build asynchronous successive halving."""
    return AsyncHyperBandScheduler(
        _STEP, **goal, max_t=num_steps, grace_period=grace_steps, reduction_factor=search.reduction_factor
    )


def _hyperband(goal: dict[str, Any], search: SearchConfig, num_steps: int, grace_steps: int) -> TrialScheduler:
    """Build asynchronous HyperBand: some trials reach their first rung later, in case they start slowly."""
    return AsyncHyperBandScheduler(
        _STEP,
        **goal,
        max_t=num_steps,
        grace_period=grace_steps,
        reduction_factor=search.reduction_factor,
        brackets=_BRACKETS,
    )


def _median(goal: dict[str, Any], search: SearchConfig, num_steps: int, grace_steps: int) -> TrialScheduler:
    """Build the median stopping rule: stop trials worse than the median of the others' running means."""
    del search, num_steps
    # By default it pauses trials so that waiting ones can catch up: a run would be stopped and restarted.
    return MedianStoppingRule(
        _STEP,
        **goal,
        grace_period=grace_steps,
        min_samples_required=2,
        min_time_slice=math.inf,
    )


def _first_come(goal: dict[str, Any], search: SearchConfig, num_steps: int, grace_steps: int) -> TrialScheduler:
    """Build a scheduler without early stopping."""
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
    """A wrapper that replays each trial's reports from the ledger to another scheduler.

    Tune restores its trials after a kill, but not the scheduler's state: without replay, the first trial after it
    would be compared with no other.
    """

    def __init__(self, scheduler: TrialScheduler, folder: str) -> None:
        """Wrap ``scheduler``; the ledger in ``folder`` is read when the first trial is added, not now."""
        super().__init__()
        self.scheduler = scheduler
        self.folder = folder
        self.known: dict[str, list[dict[str, Any]]] | None = None

    def replayed_reports(self, name: str) -> list[dict[str, Any]]:
        """Return the reports of a trial in the ledger when this process started."""
        if self.known is None:
            self.known = {
                trial.id: [evaluation.to_report() for evaluation in trial.curve] for trial in read_ledger(self.folder)
            }
        return self.known.get(name, [])

    def on_trial_add(self, tune_controller: Any, trial: TuneTrial) -> None:
        """Add the trial and replay its reports, ignoring the decisions."""
        self.scheduler.on_trial_add(tune_controller, trial)
        for report in self.replayed_reports(trial.trial_id):
            self.scheduler.on_trial_result(tune_controller, trial, report)
        if isinstance(self.scheduler, MedianStoppingRule):
            self.scheduler._stopped_trials.discard(trial)  # it asserts that a stopped trial never reports again

    def on_trial_result(self, tune_controller: Any, trial: TuneTrial, result: dict[str, Any]) -> str:
        """Return the scheduler's decision, or CONTINUE for the last step and for reports repeated after a restart.

        A trial that is stopped at its last step could not save its model.
        """
        repeated = any(report[_STEP] == result.get(_STEP) for report in self.replayed_reports(trial.trial_id))
        if repeated or result.get(_STEP, 0) >= result.get(_NUM_STEPS, math.inf):
            return str(TrialScheduler.CONTINUE)
        return str(self.scheduler.on_trial_result(tune_controller, trial, result))

    def on_trial_error(self, tune_controller: Any, trial: TuneTrial) -> None:
        """Delegate to the wrapped scheduler."""
        self.scheduler.on_trial_error(tune_controller, trial)

    def on_trial_complete(self, tune_controller: Any, trial: TuneTrial, result: dict[str, Any]) -> None:
        """Delegate to the wrapped scheduler, unless the trial ended without a metric."""
        metric = self.scheduler.metric
        if metric is None or metric in result:
            self.scheduler.on_trial_complete(tune_controller, trial, result)

    def on_trial_remove(self, tune_controller: Any, trial: TuneTrial) -> None:
        """Delegate to the wrapped scheduler."""
        self.scheduler.on_trial_remove(tune_controller, trial)

    def choose_trial_to_run(self, tune_controller: Any) -> TuneTrial | None:
        """Delegate to the wrapped scheduler."""
        return self.scheduler.choose_trial_to_run(tune_controller)

    def debug_string(self) -> str:
        """Delegate to the wrapped scheduler."""
        return str(self.scheduler.debug_string())

    @property
    def metric(self) -> str | None:
        """Return the wrapped scheduler's metric."""
        return self.scheduler.metric

    @property
    def supports_buffered_results(self) -> bool:
        """Return False: every report is processed at once."""
        return False
