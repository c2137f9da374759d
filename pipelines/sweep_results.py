"""The outputs of a sweep: the best model and its recipe, the report, MLflow's parent run."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from llava_ray.config.space import Space, SweepConfig
from llava_ray.data.storage import read_stored, write_stored
from llava_ray.errors import LlavaRayError
from llava_ray.invocation import command
from llava_ray.report.rendering import render_report
from llava_ray.sweep.page import build_sweep_page
from llava_ray.sweep.results import Results, summarize_trials
from llava_ray.sweep.search import SearchResult
from llava_ray.sweep.table import describe_settings, format_table
from llava_ray.sweep.winner import export_best_model
from llava_ray.tracking import TrackedRun, default_tracking_uri, describe_page


@dataclass(frozen=True)
class Sweep:
    """A finished sweep."""

    folder: str
    results: Results
    seconds: float
    """Seconds over all starts of the sweep."""
    left: list[str]
    """Resources that its trials did not release."""
    tracking_uri: str
    mlflow_run_id: str


def start_sweep_run(config: SweepConfig, folder: str) -> TrackedRun:
    """Start the parent MLflow run of the trials' runs."""
    uri = config.tracking.tracking_uri or default_tracking_uri(config.run.storage_path)
    tracked = TrackedRun(uri, config.tracking.experiment_name, str(config.run.name), folder)
    tracked.log_params(config.model_dump(mode="json"))
    return tracked


@contextmanager
def closing_sweep(tracked: TrackedRun) -> Iterator[None]:
    """Mark the sweep's run FAILED or KILLED in MLflow when the block raises."""
    try:
        yield
    except KeyboardInterrupt:
        tracked.end("KILLED")
        raise
    except LlavaRayError:
        tracked.end("FAILED")
        raise


def save_sweep(
    config: SweepConfig, common: SweepConfig, space: Space, searched: SearchResult, seconds: float, tracked: TrackedRun
) -> Sweep:
    """Write all outputs of a sweep, with the time of earlier starts."""
    folder = searched.folder
    results = summarize_trials(common, space, searched.trials, searched.num_steps)
    seconds += _read_seconds(folder)
    best = results.ranking[0] if results.ranking else None
    if best is not None:
        export_best_model(config, common.base, best, folder)
    report: dict[str, Any] = results.to_dict() | {
        "seconds": round(seconds, 1),
        "concurrent_trials": searched.concurrent,
        "clean": not searched.left,
        "left": searched.left,
    }
    write_stored(f"{folder}/report.json", json.dumps(report, indent=1).encode())
    write_stored(
        f"{folder}/report.html", render_report(build_sweep_page(str(config.run.name), results, seconds)).encode()
    )
    if best is not None:
        metrics = {"held_out_loss": best.loss, "steps_saved": results.saved}
        tracked.log_steps({results.num_steps: metrics | _accuracy_of(best.accuracy)})
        tracked.log_tags({"llava_ray.best": best.trials[0].id})
    if "://" not in folder:  # MLflow copies from this node's own files
        for name in ("report.html", "report.json", "trials.json", *(["best.toml"] if best else [])):
            tracked.log_file(f"{folder}/{name}")
        if best is not None and config.tracking.log_model:
            tracked.log_folder(f"{folder}/best/model", "model")
    tracked.end()
    return Sweep(folder, results, seconds, searched.left, tracked.tracking_uri, tracked.run_id)


def _read_seconds(folder: str) -> float:
    """Return the seconds in an earlier report of this sweep, 0 without one."""
    try:
        return float(json.loads(read_stored(f"{folder}/report.json"))["seconds"])
    except FileNotFoundError:
        return 0.0


def _accuracy_of(value: float | None) -> dict[str, float]:
    """Return a metric as a dictionary, empty if it is None."""
    return {} if value is None else {"held_out_accuracy": value}


def print_sweep(sweep: Sweep) -> None:
    """Print the results and their paths."""
    results, folder = sweep.results, sweep.folder
    print("\n" + "\n".join(format_table(results.trials, results.num_steps)))
    if results.ranking:
        best = results.ranking[0]
        print(
            f"\nBest: trial {best.trials[0].number} ({describe_settings(best.settings)}), held-out loss {best.loss:.4f}"
        )
    else:
        print("\nNo trial came to its end; the table says why.")
    if results.default:
        print(results.default.text)
    print(f"Steps saved by stopping early: {results.saved:.0%}; {sweep.seconds:.0f} s in all")
    for sentence in results.advice:
        print(f"Next: {sentence}")
    if sweep.left:
        print(f"Attention: the trials have not given back {', '.join(sweep.left)}")
    print(f"  report   {folder}/report.html\n  numbers  {folder}/report.json")
    if results.ranking:
        print(f"  model    {folder}/best/model\n  recipe   {command('finetune')} {folder}/best.toml")
    print(f"  mlflow   {describe_page(sweep.tracking_uri, sweep.mlflow_run_id)}")
