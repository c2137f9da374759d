"""Settings of a run's name, storage, tracking and resources."""

import re
from typing import Literal, Self

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, field_validator, model_validator

from llava_ray.config.schema import ConfigSection


class RunConfig(ConfigSection):
    """A run's name and storage, and its tolerance of failures."""

    name: str | None = None
    """Default: <recipe>-<8 hex digits of the settings, the models' fingerprints and the data>. The same name resumes
    where the run stopped."""
    storage_path: str = "runs"
    """Folder or URL shared by all nodes; the run's folder is created in it."""
    restart: bool = False
    """Start over under a name that is already used with other settings; the old folder is renamed."""
    max_failures: int = Field(default=3, ge=-1)
    """Worker failures tolerated before the run fails; -1 for any number."""
    hang_minutes: NonNegativeFloat = 3.0
    """Minutes without progress of any worker after which their stacks are printed and they are replaced, which counts
    as a failure; half as long where one does not answer, eight times as long while loading and saving, and never less
    than ten steps. 0 waits for ever."""

    @field_validator("name")
    @classmethod
    def plain_name(cls, value: str | None) -> str | None:
        """Reject names that cannot be one folder."""
        if value is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", value):
            raise ValueError("a run name is one folder: letters, digits, dot, dash and underscore")
        return value


class TrackingConfig(ConfigSection):
    """Tracking of a run."""

    report_to: tuple[Literal["mlflow", "wandb", "tensorboard"], ...] = ("mlflow",)
    """Where a training run's metrics go: MLflow always, and beside it wandb (experiment_name is its project; extra
    wandb) and tensorboard (event files in the run's folder; extra tensorboard)."""
    tracking_uri: str | None = None
    """Any MLflow tracking URI; default: SQLite in run.storage_path."""
    experiment_name: str = "llava_ray"
    """MLflow experiment."""
    log_model: bool = True
    """Log the final bundle as an MLflow artifact."""
    logging_steps: PositiveInt = 1
    """Steps between logged metrics."""
    parent_run_id: str | None = None
    """MLflow run under which this one is shown, such as a sweep's."""


def check_mlflow_alone(tracking: TrackingConfig) -> None:
    """Reject trackers that only training runs write to."""
    others = [name for name in tracking.report_to if name != "mlflow"]
    if others:
        raise ValueError(
            f"tracking.report_to names {others[0]!r}, which only training runs write to; leave it out: results are in "
            "MLflow"
        )


class ClusterConfig(ConfigSection):
    """The resources that a run takes of the cluster."""

    address: str | None = None
    """Ray address, "auto" for the one on this machine; default: the job's own, RAY_ADDRESS, or a new local one."""
    num_workers: PositiveInt = 2
    """Train workers (data-parallel ranks)."""
    use_gpu: bool | Literal["auto"] = "auto"
    """One GPU per worker; "auto" uses GPUs when the cluster has enough."""
    cpus_per_worker: PositiveFloat | Literal["auto"] = "auto"
    """CPUs a worker reserves and computes with; "auto" is one, or less on a cluster too small to leave the data stream
    any. On a cluster that the run starts itself, workers without a GPU then compute with all cores, shared out."""
    gpus_per_worker: PositiveFloat = 1.0
    """GPUs a worker reserves; less than one lets the single workers of several runs share a GPU."""
    accelerator_type: str | None = None
    """Ray's name of the GPU to use, e.g. "A100-80G"."""

    @model_validator(mode="after")
    def shares_are_of_one_worker(self) -> Self:
        """Reject two ranks of one run on one GPU, which NCCL cannot do, and several GPUs per worker."""
        if self.gpus_per_worker > 1 or (self.gpus_per_worker < 1 and self.num_workers > 1):
            raise ValueError(
                f"gpus_per_worker = {self.gpus_per_worker:g} with num_workers = {self.num_workers}: a worker drives "
                "one GPU, and only a run of one worker can share it; set gpus_per_worker = 1 or num_workers = 1"
            )
        return self
