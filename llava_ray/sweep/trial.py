"""The function of Tune's trials: an ordinary fine-tuning run, which reports at every checkpoint."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ray import tune
from ray.tune.integration.ray_train import TuneReportCallback

from llava_ray.config.finetune import FinetuneConfig
from llava_ray.errors import ConfigError, DataError, DivergedError, LlavaRayError, ModelError
from llava_ray.runtime import Resources
from llava_ray.sweep.sampling import TrialSettings
from llava_ray.sweep.trials import ACCURACY, LOSS, Evaluation, TrialState
from llava_ray.train.step_file import as_number, read_rows

# Keys of a trial's last report: its state and the reason. Tune itself has only "terminated" and "error".
ENDED_KEY, REASON = "ended", "reason"
TRIAL_KEY = "trial"
_REPEATER_INDEX = "__trial_index__"  # of Ray's Repeater, which runs a setting several times


@dataclass(frozen=True)
class TrialJob:
    """Everything that a sweep's trials need."""

    base: FinetuneConfig
    """The recipe, with the sweep's storage and MLflow run, and absolute paths."""
    resources: Resources
    objective: Callable[[FinetuneConfig, Resources, int], None]
    """The function that trains up to a step and reports to Tune; tests of scheduling replace it."""
    until: int
    """The step at which trials end."""


def build_trainable(job: TrialJob) -> Callable[[dict[str, Any]], None]:
    """Build the function that Tune runs in a separate process for each trial."""

    def trial(arguments: dict[str, Any]) -> None:
        _run_trial(arguments, job)

    return trial


def _run_trial(arguments: dict[str, Any], job: TrialJob) -> None:
    """Run one trial; permanent errors end it with a reason, all others are raised for Tune to retry."""
    try:
        name = run_name(arguments, tune.get_context().get_trial_id())
        job.objective(build_trial_config(job.base, arguments, name), job.resources, job.until)
    except DivergedError as error:
        report_end("diverged", str(error))
    except (ConfigError, DataError, ModelError) as error:
        report_end("failed", f"{type(error).__name__}: {error}")
    except LlavaRayError as error:  # Ray Train has retried within the run
        report_end("failed", str(error))


def report_end(state: TrialState, reason: str) -> None:
    """Report the end of the trial to the driver."""
    tune.report({ENDED_KEY: state, REASON: reason})


def build_trial_config(base: FinetuneConfig, arguments: dict[str, Any], name: str) -> FinetuneConfig:
    """Build the config of a trial's run. Raises ConfigError."""
    settings, seed = parse_trial_arguments(arguments, base.train.seed)
    return base.replaced({**settings, "train.seed": seed, "run.name": name})


def run_name(arguments: dict[str, Any], trial_id: str | None) -> str:
    """Return the name of a trial's run: Tune's id, that of the first round if there are several."""
    return str(arguments.get(TRIAL_KEY, {}).get("id", trial_id))


def parse_trial_arguments(arguments: dict[str, Any], base_seed: int) -> tuple[TrialSettings, int]:
    """Parse the arguments of a trial: an entry of our own list, or Optuna's suggestion."""
    if TRIAL_KEY in arguments:
        return dict(arguments[TRIAL_KEY]["settings"]), int(arguments[TRIAL_KEY]["seed"])
    settings = {key: value for key, value in arguments.items() if key != _REPEATER_INDEX}
    return settings, base_seed + int(arguments.get(_REPEATER_INDEX, 0))


def finetune_trial(config: FinetuneConfig, resources: Resources, until: int) -> None:
    """Fine-tune and report every held-out evaluation, first those of earlier starts."""
    from llava_ray.data.preparation import prepare_data  # torch and transformers, which only trials need
    from llava_ray.train.runs import committed_step
    from llava_ray.train.trainer import train_until

    for evaluation in read_evaluations(config, committed_step(config.run.storage_path, str(config.run.name))):
        tune.report(evaluation.to_report())
    prepared = prepare_data(config.data, show_progress=False)
    finished = train_until(
        config, prepared, resources, until=until, callbacks=[TuneReportCallback()], show_progress=False
    )
    ended = {ENDED_KEY: "finished", "num_steps": finished.num_steps} if finished else {ENDED_KEY: "waiting"}
    tune.report({REASON: ""} | ended | read_evaluations(config, until)[-1].to_report())


def read_evaluations(config: FinetuneConfig, last_step: int) -> list[Evaluation]:
    """Load the held-out evaluations from a run's metrics, up to a step."""
    try:
        rows = read_rows(f"{config.run.storage_path}/{config.run.name}/metrics.jsonl")
    except FileNotFoundError:
        return []
    evaluations = [Evaluation(row["step"] + 1, as_number(row[LOSS]), row.get(ACCURACY)) for row in rows if LOSS in row]
    return [evaluation for evaluation in evaluations if evaluation.step <= last_step]
