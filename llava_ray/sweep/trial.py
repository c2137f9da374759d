"""What Tune runs for each trial: an ordinary fine-tuning run of its own name, which reports at every checkpoint."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ray import tune
from ray.tune.integration.ray_train import TuneReportCallback

from llava_ray.config.sections import FinetuneConfig
from llava_ray.data.storage import read_stored
from llava_ray.errors import ConfigError, DataError, DivergedError, LlavaRayError, ModelError
from llava_ray.runtime import Resources
from llava_ray.sweep.sampling import TrialSettings
from llava_ray.sweep.trials import ACCURACY, LOSS, Evaluation, TrialState

# A key of a report that ends a trial: how it ended. Tune itself knows only "terminated" and "error".
ENDED_KEY, REASON = "ended", "reason"
TRIAL_KEY = "trial"
_REPEATER_INDEX = "__trial_index__"  # of Ray's Repeater, which runs a setting several times


@dataclass(frozen=True)
class TrialJob:
    """What every trial of a sweep is told."""

    base: FinetuneConfig
    """The recipe, with the sweep's storage and MLflow run, and names that mean the same everywhere."""
    resources: Resources
    objective: Callable[[FinetuneConfig, Resources, int], None]
    """What carries out a trial's run up to a step and reports to Tune; the tests of scheduling alone have another."""
    until: int
    """The step that trials go to."""


def build_trainable(job: TrialJob) -> Callable[[dict[str, Any]], None]:
    """Return the function that Tune runs in a process of its own for each trial."""

    def trial(given: dict[str, Any]) -> None:
        _run_trial(given, job)

    return trial


def _run_trial(given: dict[str, Any], job: TrialJob) -> None:
    """Carry out one trial; what a new start cannot mend ends it with a reason, all else is left to Tune to retry."""
    try:
        name = run_name(given, tune.get_context().get_trial_id())
        job.objective(build_trial_config(job.base, given, name), job.resources, job.until)
    except DivergedError as error:
        report_end("diverged", str(error))
    except (ConfigError, DataError, ModelError) as error:
        report_end("failed", f"{type(error).__name__}: {error}")
    except LlavaRayError as error:  # Ray Train has retried within the run
        report_end("failed", str(error))


def report_end(state: TrialState, reason: str) -> None:
    """Tell the driver how the trial ended."""
    tune.report({ENDED_KEY: state, REASON: reason})


def build_trial_config(base: FinetuneConfig, given: dict[str, Any], name: str) -> FinetuneConfig:
    """Return the run that a trial is. Raises ConfigError."""
    settings, seed = parse_trial_arguments(given, base.train.seed)
    return base.replaced({**settings, "train.seed": seed, "run.name": name})


def run_name(given: dict[str, Any], trial_id: str | None) -> str:
    """Return the name of a trial's run: Tune's id of it, that of its first round if there are several."""
    return str(given.get(TRIAL_KEY, {}).get("id", trial_id))


def parse_trial_arguments(given: dict[str, Any], base_seed: int) -> tuple[TrialSettings, int]:
    """Take apart what Tune gives a trial: a row of our own list, or Optuna's suggestion."""
    if TRIAL_KEY in given:
        return dict(given[TRIAL_KEY]["settings"]), int(given[TRIAL_KEY]["seed"])
    settings = {key: value for key, value in given.items() if key != _REPEATER_INDEX}
    return settings, base_seed + int(given.get(_REPEATER_INDEX, 0))


def finetune_trial(config: FinetuneConfig, resources: Resources, until: int) -> None:
    """Tune, and report every look at the held-out samples; first those that an earlier start has taken already."""
    from llava_ray.data.preparation import prepare_data  # torch and transformers, which only trials need
    from llava_ray.train.runs import committed_step
    from llava_ray.train.trainer import train_until

    for look in read_evaluations(config, committed_step(config.run.storage_path, str(config.run.name))):
        tune.report(look.to_report())
    prepared = prepare_data(config.data, show_progress=False)
    finished = train_until(
        config, prepared, resources, until=until, callbacks=[TuneReportCallback()], show_progress=False
    )
    ended = {ENDED_KEY: "finished", "num_steps": finished.num_steps} if finished else {ENDED_KEY: "waiting"}
    tune.report({REASON: ""} | ended | read_evaluations(config, until)[-1].to_report())


def read_evaluations(config: FinetuneConfig, last_step: int) -> list[Evaluation]:
    """Return what the run's own metrics say of held-out samples, up to a step."""
    try:
        lines = read_stored(f"{config.run.storage_path}/{config.run.name}/metrics.jsonl").splitlines()
    except FileNotFoundError:
        return []
    rows = (json.loads(line) for line in lines)
    looks = [Evaluation(row["step"] + 1, row[LOSS], row.get(ACCURACY)) for row in rows if LOSS in row]
    return [look for look in looks if look.step <= last_step]
