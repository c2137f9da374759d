"""The run's one writer: every rank tells it what each step did; it keeps metrics, ledger, MLflow and progress.

``ledger.jsonl`` has a line per step with the ids of its samples, sorted, whatever the number of ranks; a run that was
killed and went on has the same bytes as one that never was. ``metrics.jsonl`` has a line per step with its metrics.
"""

import json
import time
from collections import deque
from dataclasses import dataclass
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from llava_ray.config.sections import FinetuneConfig
from llava_ray.data.storage import read_stored, write_stored
from llava_ray.train.runs import RunFolder

_SECONDS_BETWEEN_LOGS = 5.0
_STEPS_OF_A_RATE = 50  # the last so many tell how fast a run is

TRAINING = "training"


@dataclass(frozen=True)
class RunProgress:
    """How far a run is."""

    state: str
    """``TRAINING``, or what is done before and after."""
    first: int | None
    """The step that these workers began with; None until they are that far."""
    done: int
    """Steps that are done, those of earlier starts included."""
    metrics: dict[str, float]
    """Of the last step."""
    steps_per_second: float | None
    """Over the last steps; None before there are two."""
    said: list[str]
    """Lines for the person who started the run, all so far."""


class RunRecorder:
    """Collect the ranks' records; run as a Ray actor (see ``start_recorder``)."""

    def __init__(self, run_folder: str, tracked: dict[str, Any], params: dict[str, Any], logging_steps: int) -> None:
        """Read what earlier starts of this run have written."""
        from llava_ray.tracking import TrackedRun  # MLflow; whoever holds this actor's handle imports this module

        self.run_folder = run_folder
        self.tracked = TrackedRun(**tracked)
        self.tracked.log_params(params)
        self.logging_steps = logging_steps
        self.ledger: dict[int, list[str]] = {
            row["step"]: row["samples"] for row in _read_rows(f"{run_folder}/ledger.jsonl")
        }
        self.metrics: dict[int, dict[str, float]] = {
            row.pop("step"): row for row in _read_rows(f"{run_folder}/metrics.jsonl")
        }
        self.partial: dict[int, dict[int, list[str]]] = {}
        self.logged = max(self.metrics, default=-1)
        self.log_time = time.monotonic()
        self.world_size = 0
        self.state = "starting workers"
        self.first: int | None = None
        self.ended: deque[tuple[int, float]] = deque(maxlen=_STEPS_OF_A_RATE)
        self.said: list[str] = []
        self.stopping = False

    def enter(self, state: str) -> None:
        """Take note of what the workers do now."""
        self.state = state

    def say(self, line: str) -> None:
        """Pass a line on to the person who started the run."""
        if line not in self.said:  # workers that start again say it again
            self.said.append(line)

    def stop(self) -> None:
        """Ask the workers to stop after the step that they are in; they hear of it with their next record."""
        self.stopping = True
        self.tracked.end("KILLED")  # at once: who asked may not wait

    def rewind(self, rank: int, first_step: int, world_size: int) -> None:
        """Forget the steps that are about to be taken again; every rank says so when it starts."""
        del rank
        self.world_size = world_size
        self.partial.clear()
        for steps in (self.ledger, self.metrics):
            for step in [step for step in steps if step >= first_step]:
                del steps[step]
        self.logged = min(self.logged, first_step - 1)
        self.first = first_step
        self.ended.clear()

    def record(self, rank: int, step: int, metrics: dict[str, float], samples: list[str]) -> bool:
        """Take one rank's account of a step; the last rank's completes it. Return whether the run is to stop."""
        by_rank = self.partial.setdefault(step, {})
        by_rank[rank] = samples
        if rank == 0:
            self.metrics[step] = metrics
        if len(by_rank) == self.world_size:
            self.ledger[step] = sorted(sample for ids in self.partial.pop(step).values() for sample in ids)
            self.ended.append((step, time.monotonic()))
            self.state = TRAINING
            if time.monotonic() - self.log_time > _SECONDS_BETWEEN_LOGS:
                self.log()
        return self.stopping

    def log(self) -> None:
        """Send what is new to MLflow."""
        self.log_time = time.monotonic()
        new = {step: row for step, row in self.metrics.items() if step > self.logged and step in self.ledger}
        self.tracked.log_steps({step: row for step, row in new.items() if step % self.logging_steps == 0})
        self.logged = max(new, default=self.logged)

    def flush(self) -> None:
        """Write ledger and metrics; answered only when they are on storage."""
        ledger = [{"step": step, "samples": self.ledger[step]} for step in sorted(self.ledger)]
        metrics = [{"step": step} | self.metrics[step] for step in sorted(self.metrics)]
        for name, rows in (("ledger", ledger), ("metrics", metrics)):
            text = "".join(json.dumps(row) + "\n" for row in rows)
            write_stored(f"{self.run_folder}/{name}.jsonl", text.encode())
        self.log()

    def progress(self) -> RunProgress:
        """Return how far the run is."""
        last = max(self.ledger, default=-1)
        rate = None
        if len(self.ended) > 1:
            (first, start), (end, now) = self.ended[0], self.ended[-1]
            rate = (end - first) / max(now - start, 1e-9)
        return RunProgress(self.state, self.first, last + 1, self.metrics.get(last, {}), rate, list(self.said))

    def close(self, status: str, tags: dict[str, str], artifacts: dict[str, str], files: list[str]) -> str:
        """Write everything, keep the artifacts (name → folder) and files, end the MLflow run and return its id."""
        self.flush()
        self.tracked.log_tags(tags)
        for path in files:
            self.tracked.log_file(path)
        for name, folder in artifacts.items():
            self.tracked.log_folder(folder, name)
        self.tracked.end(status)
        return self.tracked.run_id


def start_recorder(run: RunFolder, config: FinetuneConfig, tracking_uri: str, settings: str) -> ActorHandle:
    """Start the journal beside the driver; it lives and dies with the job. ``settings`` is a hash of theirs."""
    tracked = {
        "tracking_uri": tracking_uri,
        "experiment_name": config.tracking.experiment_name,
        "name": run.name,
        "key": run.path,
        "parent_run_id": config.tracking.parent_run_id,
        "settings": settings,
    }
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor = ray.remote(RunRecorder).options(num_cpus=0, scheduling_strategy=here)
    return actor.remote(run.path, tracked, config.model_dump(mode="json"), config.tracking.logging_steps)


def _read_rows(path: str) -> list[dict[str, Any]]:
    """Return the rows of a JSONL file; none when there is no file."""
    try:
        lines = read_stored(path).splitlines()
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in lines]
