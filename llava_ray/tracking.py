"""MLflow tracking: one run per job, written from one process, and continued after any restart.

MLflow takes seconds to import: only functions that ask it something do.
"""

import logging
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llava_ray.errors import ConfigError

_METRICS_PER_REQUEST = 1000  # MLflow's own limits
_PARAMS_PER_REQUEST = 100
_PARAM_LENGTH = 6000

_PAGE = "http://127.0.0.1:5000"  # of `mlflow ui`


def default_tracking_uri(storage_path: str) -> str:
    """Return the SQLite store beside the runs; for remote storage, one in the folder the job was started from."""
    folder = Path("runs") if "://" in storage_path else Path(storage_path)
    folder.mkdir(parents=True, exist_ok=True)
    return f"sqlite:///{folder.resolve()}/mlflow.db"


def moved_tracking_uri(noted: str, storage_path: str) -> str:
    """Return a finished run's tracking URI: the SQLite store beside it, if both were copied or moved together."""
    if noted.startswith("sqlite:///") and noted.endswith("/mlflow.db"):
        beside = default_tracking_uri(storage_path)
        if Path(beside.removeprefix("sqlite:///")).exists():
            return beside
    return noted


class TrackedRun:
    """One MLflow run, found again by its ``key`` tag or created."""

    def __init__(
        self,
        tracking_uri: str,
        experiment_name: str,
        name: str,
        key: str,
        parent_run_id: str | None = None,
        settings: str | None = None,
    ) -> None:
        """Attach to the run tagged ``key`` (a run folder), or create it, below a parent if it has one.

        An existing run with other ``settings`` (a hash) is left alone and a new one is created: params are immutable in
        MLflow, so the old ones would be shown beside the new curves. Raises ConfigError if MLflow refuses.
        """
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException
        from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

        self.tracking_uri = tracking_uri
        logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)  # hides the messages about creating tables
        try:
            self.client = MlflowClient(tracking_uri)
            experiment = self.client.get_experiment_by_name(experiment_name)
            experiment_id = (
                experiment.experiment_id
                if experiment
                else self.client.create_experiment(experiment_name, artifact_location=_artifact_location(tracking_uri))
            )
            found = list(self.client.search_runs([experiment_id], f"tags.`llava_ray.run` = '{key}'", max_results=1))
            if found and settings and found[0].data.tags.get("llava_ray.settings", settings) != settings:
                self.client.set_tag(found[0].info.run_id, "llava_ray.run", f"{key} (replaced)")
                found = []
            tags = {"llava_ray.run": key} | ({MLFLOW_PARENT_RUN_ID: parent_run_id} if parent_run_id else {})
            tags |= {"llava_ray.settings": settings} if settings else {}
            run = found[0] if found else self.client.create_run(experiment_id, tags=tags, run_name=name)
        except MlflowException as error:
            raise ConfigError(f"MLflow at {tracking_uri!r}: {error}; check tracking.tracking_uri") from error
        self.run_id: str = run.info.run_id
        self.experiment_id: str = experiment_id
        self.client.update_run(self.run_id, status="RUNNING")

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Log a resolved config, flattened; existing values stay (MLflow's params are immutable)."""
        from mlflow.entities import Param

        known = self.client.get_run(self.run_id).data.params
        fresh = [Param(key, str(value)[:_PARAM_LENGTH]) for key, value in _flattened(params) if key not in known]
        for start in range(0, len(fresh), _PARAMS_PER_REQUEST):
            self.client.log_batch(self.run_id, params=fresh[start : start + _PARAMS_PER_REQUEST])

    def log_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags, such as those of the run's lineage."""
        for key, value in tags.items():
            self.client.set_tag(self.run_id, key, value)

    def log_steps(self, steps: Mapping[int, Mapping[str, float]]) -> None:
        """Log the metrics of several steps."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(key, value, now, step) for step, row in steps.items() for key, value in row.items()]
        for start in range(0, len(metrics), _METRICS_PER_REQUEST):
            self.client.log_batch(self.run_id, metrics=metrics[start : start + _METRICS_PER_REQUEST])

    def log_folder(self, folder: str, name: str) -> None:
        """Log a folder's files as the artifact ``name``."""
        self.client.log_artifacts(self.run_id, folder, name)

    def log_file(self, path: str) -> None:
        """Log one file as an artifact."""
        self.client.log_artifact(self.run_id, path)

    def end(self, status: str = "FINISHED") -> None:
        """Close the run: FINISHED, FAILED or KILLED."""
        self.client.set_terminated(self.run_id, status)


def check_store(tracking_uri: str | None) -> None:
    """Raise ConfigError for a tracking URI that MLflow does not know; no server is contacted."""
    if tracking_uri is None or tracking_uri.startswith("http"):
        return
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    try:
        MlflowClient(tracking_uri).search_experiments(max_results=1)
    except (MlflowException, ImportError, OSError) as error:
        raise ConfigError(f"MLflow at {tracking_uri!r}: {error}; check tracking.tracking_uri") from error


def describe_page(tracking_uri: str, run_id: str, experiment: str | None = None) -> str:
    """Return how to open a run in MLflow: the command that serves a local store, and the address.

    Without the ``experiment`` that the run belongs to, MLflow is asked for it, and imported: that takes seconds.
    """
    if experiment is None:
        from mlflow import MlflowClient

        experiment = MlflowClient(tracking_uri).get_run(run_id).info.experiment_id
    page = f"/#/experiments/{experiment}/runs"  # without "runs", MLflow opens its page of traces
    if tracking_uri.startswith("http"):
        return f"{tracking_uri.rstrip('/')}{page}/{run_id}"
    return f"mlflow ui --backend-store-uri {tracking_uri}  then  {_PAGE}{page}  (run {run_id})"


def _artifact_location(tracking_uri: str) -> str | None:
    """Return a folder beside a SQLite store (MLflow would use the working directory); None where a server decides."""
    if not tracking_uri.startswith("sqlite:///"):
        return None
    return (Path(tracking_uri.removeprefix("sqlite:///")).resolve().parent / "mlartifacts").as_uri()


def _flattened(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield dotted keys with their values."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flattened(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
