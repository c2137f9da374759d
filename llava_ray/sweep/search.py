"""The search of a sweep on a Ray cluster: Tune over ordinary runs, until all trials have ended."""

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray
from ray import tune
from ray.tune.experiment import Trial as TuneTrial

from llava_ray.config.finetune import FinetuneConfig
from llava_ray.config.space import Space, SweepConfig
from llava_ray.data.storage import file_size
from llava_ray.runtime import Resources, runs_at_once
from llava_ray.sweep.cluster_usage import (
    check_state_api,
    find_dashboard_address,
    release_orphaned_groups,
    snapshot_usage,
    wait_until_released,
)
from llava_ray.sweep.ledger import TrialLedger, list_unfinished, read_ledger
from llava_ray.sweep.rounds import find_eliminated, is_round_complete, plan_rounds
from llava_ray.sweep.schedulers import build_scheduler
from llava_ray.sweep.searching import build_round_search, build_search, list_trial_arguments
from llava_ray.sweep.trial import TrialJob, build_trainable
from llava_ray.sweep.trial_events import TrialEventRecorder, close_run, run_name_of
from llava_ray.sweep.trials import Trial

# Tune's settings that are environment variables only.
_TUNE_SETTINGS = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # three files per trial, superfluous with our ledger
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a diverged trial reports its state without a metric
    "TUNE_GLOBAL_CHECKPOINT_S": "1",  # a killed driver loses at most this much
    "TUNE_FORCE_TRIAL_CLEANUP_S": "10",  # a stopped trial waits for its run, which does not end by itself
    "RAY_AIR_NEW_OUTPUT": "0",  # we print our own table
    # Ctrl-C must end the driver as SIGTERM does: Tune would complete every trial, as if none were to resume.
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}
_OVER = (TuneTrial.TERMINATED, TuneTrial.ERROR)
_TRIAL_CPUS = 0.01  # of the process that starts a trial's run and waits; Tune rejects 0


@dataclass(frozen=True)
class SearchResult:
    """The result of a search."""

    folder: str
    trials: list[Trial]
    num_steps: int
    """Of a whole run."""
    concurrent: int
    left: list[str]
    """Resources that were not released in the end."""


def search(
    config: SweepConfig,
    space: Space,
    folder: str,
    resources: Resources,
    objective: Callable[[FinetuneConfig, Resources, int], None],
    num_steps: int,
    tracked: dict[str, str] | None = None,
) -> SearchResult:
    """Run all trials that have not ended. Needs a connected Ray.

    ``num_steps`` are those of a whole run; ``tracked`` holds the MLflow settings of the trials' runs. Raises
    KeyboardInterrupt when stopped by Ctrl-C; the same call resumes.
    """
    check_state_api(find_dashboard_address())
    os.environ.update(_TUNE_SETTINGS)
    # It would warn about the missing files of the disabled loggers.
    logging.getLogger("ray.tune.analysis.experiment_analysis").setLevel(logging.ERROR)
    concurrent = config.sweep.max_concurrent_trials or runs_at_once(ray.cluster_resources(), resources)
    before, left = snapshot_usage(), list[str]()
    num_trials = _count_trials(config, space)
    where = build_search(space, config.sweep, config.base)
    for this in plan_rounds(config.sweep, num_steps, grace_steps(config)):
        if not is_round_complete(read_ledger(folder), this.until, num_trials):
            job = TrialJob(config.base, resources, objective, this.until)
            tuner = _make_tuner(config, where, folder, job, num_steps, concurrent, tracked)
            with release_orphaned_groups(resources.bundle):
                results = tuner.fit()
                left = wait_until_released(before)
            if any(trial.status not in _OVER for trial in results._experiment_analysis.trials):
                raise KeyboardInterrupt  # Tune does not raise it
            _reconcile(folder, this.until)
        ledger = TrialLedger(folder)
        for trial in find_eliminated(list(ledger.trials.values()), this, config.sweep.stop_metric):
            close_run(folder, trial.id, tracked)
            ledger.end(trial.id, "stopped")
        where = build_round_search(list_unfinished(list(ledger.trials.values())))
    return SearchResult(folder, read_ledger(folder), num_steps, concurrent, left)


def grace_steps(config: SweepConfig) -> int:
    """Return the steps before a trial may be stopped."""
    return config.sweep.grace_steps or config.train.save_steps


def _reconcile(folder: str, until: int) -> None:
    """Record the end of trials that Tune has finished but the ledger has not, after a kill of the driver."""
    ledger = TrialLedger(folder)
    for trial in [trial for trial in ledger.trials.values() if trial.state == "running"]:
        if file_size(f"{folder}/trials/{trial.id}/finished.json") is not None:
            ledger.end(trial.id, "finished")
        else:
            ledger.end(trial.id, "waiting" if trial.steps == until else "stopped")


def _count_trials(config: SweepConfig, space: Space) -> int:
    """Return the number of trials."""
    if config.sweep.method == "optuna":
        return config.sweep.num_trials * config.sweep.num_seeds
    return len(list_trial_arguments(space, config.sweep, config.base))


def _make_tuner(
    config: SweepConfig,
    where: dict[str, Any],
    folder: str,
    job: TrialJob,
    num_steps: int,
    concurrent: int,
    tracked: dict[str, str] | None,
) -> tune.Tuner:
    """Build a Tuner for a round, or restore that of an interrupted sweep."""
    trainable = tune.with_resources(build_trainable(job), {"CPU": _TRIAL_CPUS})
    name = f"tune-{job.until}"
    if tune.Tuner.can_restore(f"{folder}/{name}"):
        return tune.Tuner.restore(f"{folder}/{name}", trainable=trainable, resume_unfinished=True)
    return tune.Tuner(
        trainable,
        param_space=where["param_space"],
        tune_config=tune.TuneConfig(
            num_samples=where["num_samples"],
            search_alg=where.get("search_alg"),
            scheduler=build_scheduler(config.sweep, num_steps, grace_steps(config), folder),
            max_concurrent_trials=concurrent,
            reuse_actors=True,  # starting a process that imports torch and transformers is slow
            trial_dirname_creator=_name_folder,
        ),
        run_config=tune.RunConfig(
            name=name,
            storage_path=folder,
            callbacks=[TrialEventRecorder(folder, config.train.seed, num_steps, tracked)],
            failure_config=tune.FailureConfig(max_failures=config.sweep.max_retries),
            verbose=0,
        ),
    )


def _name_folder(trial: TuneTrial) -> str:
    """Return the name of Tune's folder for a trial, that of its run."""
    return run_name_of(trial)
