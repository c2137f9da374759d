"""A sweep on a Ray cluster, from its settings to trials that have all ended: Tune around ordinary runs."""

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray
from ray import tune
from ray.tune.experiment import Trial as TuneTrial

from llava_ray.config.sections import FinetuneConfig
from llava_ray.config.space import Space, SweepConfig
from llava_ray.data.storage import file_size
from llava_ray.runtime import Resources, runs_at_once
from llava_ray.sweep.cleanliness import check_state_api, clearing, dashboard_address, take_stock, wait_until_clean
from llava_ray.sweep.ledger import Ledger, read_ledger, unfinished
from llava_ray.sweep.rounds import is_over, losers, plan_rounds
from llava_ray.sweep.schedulers import make_scheduler
from llava_ray.sweep.searching import list_given, make_search, search_again
from llava_ray.sweep.trial import Job, make_trainable
from llava_ray.sweep.trials import Trial
from llava_ray.sweep.watching import Watcher, close_run, name_of

# Tune's own settings, which it takes from the environment only.
TUNE_SETTINGS = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # three files a trial that nobody reads beside our ledger
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a trial that diverged reports how it ended, and no number
    "TUNE_GLOBAL_CHECKPOINT_S": "1",  # a killed driver forgets at most this much
    "TUNE_FORCE_TRIAL_CLEANUP_S": "10",  # a stopped trial waits for its run, which will not end by itself
    "RAY_AIR_NEW_OUTPUT": "0",  # there is a table of ours
    # Ctrl-C must end the driver as SIGTERM does: Tune would end every trial in order, as if none were to go on.
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}
OVER = (TuneTrial.TERMINATED, TuneTrial.ERROR)
TRIAL_CPUS = 0.01  # of the process that starts a trial's run and waits; nothing at all is refused


@dataclass(frozen=True)
class Searched:
    """What a sweep has come to."""

    folder: str
    trials: list[Trial]
    num_steps: int
    """Of a whole run."""
    concurrent: int
    left: list[str]
    """What was not given back in the end; empty if all is well."""


def search(
    config: SweepConfig,
    space: Space,
    folder: str,
    resources: Resources,
    objective: Callable[[FinetuneConfig, Resources, int], None],
    num_steps: int,
    tracked: dict[str, str] | None = None,
) -> Searched:
    """Run every trial that has not ended yet. Needs a connected Ray.

    ``num_steps`` are those of a whole run; ``tracked`` says how the MLflow runs of trials are found. Raises
    KeyboardInterrupt when stopped by Ctrl-C: the same call goes on.
    """
    check_state_api(dashboard_address())
    os.environ.update(TUNE_SETTINGS)
    # That there are no files of the loggers that are switched off above.
    logging.getLogger("ray.tune.analysis.experiment_analysis").setLevel(logging.ERROR)
    concurrent = config.sweep.max_concurrent_trials or runs_at_once(ray.cluster_resources(), resources)
    before, left = take_stock(), list[str]()
    num_trials = count_trials(config, space)
    where = make_search(space, config.sweep, config.base)
    for this in plan_rounds(config.sweep, num_steps, grace_steps(config)):
        if not is_over(read_ledger(folder), this.until, num_trials):
            job = Job(config.base, resources, objective, this.until)
            tuner = make_tuner(config, where, folder, job, num_steps, concurrent, tracked)
            with clearing(resources.bundle):
                results = tuner.fit()
                left = wait_until_clean(before)
            if any(trial.status not in OVER for trial in results._experiment_analysis.trials):
                raise KeyboardInterrupt  # Tune has swallowed it
            reconcile(folder, this.until)
        ledger = Ledger(folder)
        for trial in losers(list(ledger.trials.values()), this, config.sweep.stop_metric):
            close_run(folder, trial.id, tracked)
            ledger.end(trial.id, "stopped")
        where = search_again(unfinished(list(ledger.trials.values())))
    return Searched(folder, read_ledger(folder), num_steps, concurrent, left)


def grace_steps(config: SweepConfig) -> int:
    """Return the steps that every trial may take."""
    return config.sweep.grace_steps or config.train.save_steps


def reconcile(folder: str, until: int) -> None:
    """End the trials that Tune knows to be over and the ledger does not: the driver was killed in between."""
    ledger = Ledger(folder)
    for trial in [trial for trial in ledger.trials.values() if trial.state == "running"]:
        if file_size(f"{folder}/trials/{trial.id}/finished.json") is not None:
            ledger.end(trial.id, "finished")
        else:
            ledger.end(trial.id, "waiting" if trial.steps == until else "stopped")


def count_trials(config: SweepConfig, space: Space) -> int:
    """Return how many trials the sweep has."""
    if config.sweep.method == "optuna":
        return config.sweep.num_trials * config.sweep.num_seeds
    return len(list_given(space, config.sweep, config.base))


def make_tuner(
    config: SweepConfig,
    where: dict[str, Any],
    folder: str,
    job: Job,
    num_steps: int,
    concurrent: int,
    tracked: dict[str, str] | None,
) -> tune.Tuner:
    """Return a new Tuner for a round, or the one that an interrupted sweep has left."""
    trainable = tune.with_resources(make_trainable(job), {"CPU": TRIAL_CPUS})
    name = f"tune-{job.until}"
    if tune.Tuner.can_restore(f"{folder}/{name}"):
        return tune.Tuner.restore(f"{folder}/{name}", trainable=trainable, resume_unfinished=True)
    return tune.Tuner(
        trainable,
        param_space=where["param_space"],
        tune_config=tune.TuneConfig(
            num_samples=where["num_samples"],
            search_alg=where.get("search_alg"),
            scheduler=make_scheduler(config.sweep, num_steps, grace_steps(config), folder),
            max_concurrent_trials=concurrent,
            reuse_actors=True,  # starting a process and importing torch and transformers takes it long
            trial_dirname_creator=name_folder,
        ),
        run_config=tune.RunConfig(
            name=name,
            storage_path=folder,
            callbacks=[Watcher(folder, config.train.seed, num_steps, tracked)],
            failure_config=tune.FailureConfig(max_failures=config.sweep.max_retries),
            verbose=0,
        ),
    )


def name_folder(trial: TuneTrial) -> str:
    """Name Tune's own folder of a trial as its run is named."""
    return name_of(trial)
