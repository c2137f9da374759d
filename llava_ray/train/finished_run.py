"""The result of a finished run: closed in MLflow, saved in the run's folder, and found again by the next start."""

import json
from dataclasses import dataclass

import ray
from ray.actor import ActorHandle

from llava_ray.config.finetune import FinetuneConfig
from llava_ray.config.mixtures import learnt_paths
from llava_ray.config.recipes import settings_hash
from llava_ray.data.plan import Plan
from llava_ray.data.shards import PreparedData
from llava_ray.data.storage import write_stored
from llava_ray.tracking import moved_tracking_uri
from llava_ray.train.run_report import write_run_report
from llava_ray.train.runs import RunFolder, committed_state
from llava_ray.train.score_history import ScoreHistory
from llava_ray.train.step_file import as_number, read_rows


@dataclass(frozen=True)
class FinishedRun:
    """The result of a finished run."""

    folder: RunFolder
    num_steps: int
    metrics: dict[str, float]
    """Of the last step."""
    tracking_uri: str
    mlflow_run_id: str
    data_hash: str
    mlflow_experiment_id: str | None = None
    """None where it was not noted."""
    best_step: int | None = None
    """The steps of the checkpoint that the model is of; None for the last."""
    reused: bool = False
    """Whether it was already finished, so that nothing was done."""

    def read_losses(self) -> list[float]:
        """Load the loss of every step; NaN where it was not finite and the step was skipped."""
        return [as_number(row["loss"]) for row in read_rows(self._metrics_path)]

    def read_metrics(self) -> list[dict[str, float | None]]:
        """Load the metrics of every step."""
        return [{key: value for key, value in row.items() if key != "step"} for row in read_rows(self._metrics_path)]

    @property
    def _metrics_path(self) -> str:
        return f"{self.folder.path}/metrics.jsonl"


def reuse_finished(config: FinetuneConfig, run: RunFolder, prepared: PreparedData) -> FinishedRun | None:
    """Return the result of a run that has finished before, None where there is still something to do."""
    saved = None if config.run.restart else run.finished(prepared.data_hash)
    if saved is None:
        return None
    uri = config.tracking.tracking_uri or moved_tracking_uri(saved["tracking_uri"], config.run.storage_path)
    return FinishedRun(run, reused=True, **saved | {"tracking_uri": uri})


def note_finished(
    config: FinetuneConfig, run: RunFolder, plan: Plan, prepared: PreparedData, journal: ActorHandle, tracking_uri: str
) -> FinishedRun:
    """Close the MLflow run with lineage and artifacts, and save ``finished.json`` in the run's folder."""
    num_steps, best_step = plan.num_steps, None
    if config.held_out.selects:  # decided by what is committed, as in the workers
        state = committed_state(run.storage_path, run.name) or {}
        num_steps = int(state.get("step", num_steps))
        best_step = ScoreHistory(config.held_out, state.get("scores", ())).model_step
    lineage = {
        "data_path": ", ".join(learnt_paths(config.data).values()),
        "data_hash": prepared.data_hash,
        "plan_hash": plan.hash,
        "model_name_or_path": config.model.model_name_or_path,
        "vision_tower": str(config.model.vision_tower),
        "settings_hash": settings_hash(config),
        "bundle": run.bundle,
    }
    if best_step is not None:
        lineage["best_step"] = str(best_step)
    local = "://" not in run.path  # MLflow copies from this node's own files
    artifacts = {"model": run.bundle} if config.tracking.log_model and local else {}
    files = [f"{run.path}/{name}" for name in ("resolved.json", "ledger.jsonl", "metrics.jsonl")] if local else []
    ray.get(journal.flush.remote())
    if report := write_run_report(config, run):
        files.append(report)
    tags = {f"llava_ray.{key}": value for key, value in lineage.items()}
    run_id, experiment_id = ray.get(journal.close.remote("FINISHED", tags, artifacts, files))
    metrics = ray.get(journal.progress.remote()).metrics
    saved = {
        "num_steps": num_steps,
        "metrics": metrics,
        "tracking_uri": tracking_uri,
        "mlflow_run_id": run_id,
        "mlflow_experiment_id": experiment_id,
        "data_hash": prepared.data_hash,
    } | ({} if best_step is None else {"best_step": best_step})
    write_stored(f"{run.path}/finished.json", json.dumps(saved, indent=1).encode())
    return FinishedRun(run, **saved)
