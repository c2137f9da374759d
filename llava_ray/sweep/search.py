"""A sweep on a Ray cluster, from its settings to trials that have all ended: Tune around ordinary runs."""

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass

import ray
from ray import tune
from ray.tune.experiment import Trial as TuneTrial

from llava_ray.config.sections import FinetuneConfig
from llava_ray.config.space import Space, SweepConfig
from llava_ray.data.storage import file_size
from llava_ray.runtime import Resources, runs_at_once
from llava_ray.sweep.cleanliness import check_state_api, clearing, dashboard_address, take_stock, wait_until_clean
from llava_ray.sweep.ledger import Ledger, read_ledger, unfinished
from llava_ray.sweep.schedulers import make_scheduler
from llava_ray.sweep.searching import list_given, make_search
from llava_ray.sweep.trial import Job, make_trainable
from llava_ray.sweep.trials import Trial
from llava_ray.sweep.watching import Watcher

# Tune's own settings, which it takes from the environment only.
TUNE_SETTINGS = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # three files a trial that nobody reads beside our ledger
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a trial that diverged reports how it ended, and no number
    "TUNE_GLOBAL_CHECKPOINT_S": "1",  # a killed driver forgets at most this much
    "TUNE_FORCE_TRIAL_CLEANUP_S": "10",  # a stopped trial waits for its run, which will not end by itself
    "RAY_AIR_NEW_OUTPUT": "0",  # there is a table of ours
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
    objective: Callable[[FinetuneConfig, Resources], None],
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
    before = take_stock()
    if not ended(config, space, folder):
        job = Job(config.base, resources, objective)
        tuner = make_tuner(config, space, folder, job, num_steps, concurrent, tracked)
        with clearing(resources.bundle):
            results = tuner.fit()
            left = wait_until_clean(before)
        if any(trial.status not in OVER for trial in results._experiment_analysis.trials):
            raise KeyboardInterrupt  # Tune has swallowed it
        reconcile(folder)
    else:
        left = []
    return Searched(folder, read_ledger(folder), num_steps, concurrent, left)


def reconcile(folder: str) -> None:
    """End the trials that Tune knows to be over and the ledger does not: the driver was killed in between."""
    ledger = Ledger(folder)
    for trial in unfinished(list(ledger.trials.values())):
        done = file_size(f"{folder}/trials/{trial.id}/finished.json") is not None
        ledger.end(trial.id, "finished" if done else "stopped")


def ended(config: SweepConfig, space: Space, folder: str) -> bool:
    """Tell whether every trial of the sweep has been started and has ended."""
    trials = read_ledger(folder)
    return len(trials) >= count_trials(config, space) and not unfinished(trials)


def count_trials(config: SweepConfig, space: Space) -> int:
    """Return how many trials the sweep has."""
    if config.sweep.method == "optuna":
        return config.sweep.num_trials * config.sweep.num_seeds
    return len(list_given(space, config.sweep, config.base))


def make_tuner(
    config: SweepConfig,
    space: Space,
    folder: str,
    job: Job,
    num_steps: int,
    concurrent: int,
    tracked: dict[str, str] | None,
) -> tune.Tuner:
    """Return a new Tuner, or the one that an interrupted sweep has left."""
    trainable = tune.with_resources(make_trainable(job), {"CPU": TRIAL_CPUS})
    if tune.Tuner.can_restore(f"{folder}/tune"):
        return tune.Tuner.restore(f"{folder}/tune", trainable=trainable, resume_unfinished=True)
    where = make_search(space, config.sweep, config.base)
    grace = config.sweep.grace_steps or config.train.save_steps
    return tune.Tuner(
        trainable,
        param_space=where["param_space"],
        tune_config=tune.TuneConfig(
            num_samples=where["num_samples"],
            search_alg=where.get("search_alg"),
            scheduler=make_scheduler(config.sweep, num_steps, grace, folder),
            max_concurrent_trials=concurrent,
            trial_dirname_creator=name_folder,
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=folder,
            callbacks=[Watcher(folder, config.train.seed, num_steps, tracked)],
            failure_config=tune.FailureConfig(max_failures=config.sweep.max_retries),
            verbose=0,
        ),
    )


def name_folder(trial: TuneTrial) -> str:
    """Name Tune's own folder of a trial as its run is named."""
    return str(trial.trial_id)
