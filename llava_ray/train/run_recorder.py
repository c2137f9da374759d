"""The run's only writer: every rank sends it each step's record; it writes metrics, ledger, MLflow and progress.

``ledger.jsonl`` has a line per step with the ids of its samples, sorted, whatever the number of ranks; a run that was
killed and resumed has the same bytes as one that never was. ``metrics.jsonl`` has a line per step with its metrics.
"""

import datetime
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
_RATE_WINDOW = 50  # the window over which the rate is computed

TRAINING = "training"


@dataclass(frozen=True)
class RunProgress:
    """The progress of a run."""

    state: str
    """``TRAINING``, or the phase before or after it."""
    first: int | None
    """The step at which these workers started; None until they have restored."""
    done: int
    """Completed steps, those of earlier starts included."""
    metrics: dict[str, float]
    """Of the last step."""
    steps_per_second: float | None
    """Over the last steps; None before there are two."""
    said: list[str]
    """Lines for the person who started the run, all so far."""


class RunRecorder:
    """Collect the ranks' records; run as a Ray actor (see ``start_recorder``)."""

    def __init__(
        self,
        run_folder: str,
        tracked: dict[str, Any],
        params: dict[str, Any],
        logging_steps: int,
        started: float | None = None,
    ) -> None:
        """Load the ledger and metrics that earlier starts of this run have written; ``started`` is the time of this."""
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
        self.ended: deque[tuple[int, float]] = deque(maxlen=_RATE_WINDOW)
        self.said: list[str] = []
        self.started = time.time() if started is None else started
        self.stepped = False
        self.stopping = False

    def enter(self, state: str) -> None:
        """Set the workers' current phase."""
        self.state = state

    def say(self, line: str) -> None:
        """Add a line for the person who started the run, once."""
        if line not in self.said:  # restarted workers send it again
            self.said.append(line)

    def stop(self) -> None:
        """Request a stop after the current step; the workers receive it as the answer to their next record."""
        self.stopping = True
        self.tracked.end("KILLED")  # at once: the driver may exit before the workers have stopped

    def rewind(self, rank: int, first_step: int, world_size: int) -> None:
        """Drop the records of steps that will be repeated; every rank calls this when it starts."""
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
        """Record one rank's step; the last rank's record completes it. Return whether the run is to stop."""
        by_rank = self.partial.setdefault(step, {})
        by_rank[rank] = samples
        if rank == 0:
            self.metrics[step] = metrics
        if len(by_rank) == self.world_size:
            self.ledger[step] = sorted(sample for ids in self.partial.pop(step).values() for sample in ids)
            self.ended.append((step, time.monotonic()))
            self.state = TRAINING
            self._say_first_step()
            if time.monotonic() - self.log_time > _SECONDS_BETWEEN_LOGS:
                self.log()
        return self.stopping

    def _say_first_step(self) -> None:
        """Say how long the start took, once: restarted workers do not count."""
        if not self.stepped:
            self.stepped = True
            now = datetime.datetime.now().time().isoformat("milliseconds")
            self.say(f"First step done at {now}, {time.time() - self.started:.1f} s after its workers were asked for")

    def log(self) -> None:
        """Log new steps to MLflow."""
        self.log_time = time.monotonic()
        new = {step: row for step, row in self.metrics.items() if step > self.logged and step in self.ledger}
        self.tracked.log_steps({step: row for step, row in new.items() if step % self.logging_steps == 0})
        self.logged = max(new, default=self.logged)

    def flush(self) -> None:
        """Write ledger and metrics; return only when they are on storage."""
        ledger = [{"step": step, "samples": self.ledger[step]} for step in sorted(self.ledger)]
        metrics = [{"step": step} | self.metrics[step] for step in sorted(self.metrics)]
        for name, rows in (("ledger", ledger), ("metrics", metrics)):
            text = "".join(json.dumps(row) + "\n" for row in rows)
            write_stored(f"{self.run_folder}/{name}.jsonl", text.encode())
        self.log()

    def progress(self) -> RunProgress:
        """Return the run's progress."""
        last = max(self.ledger, default=-1)
        rate = None
        if len(self.ended) > 1:
            (first, start), (end, now) = self.ended[0], self.ended[-1]
            rate = (end - first) / max(now - start, 1e-9)
        return RunProgress(self.state, self.first, last + 1, self.metrics.get(last, {}), rate, list(self.said))

    def close(self, status: str, tags: dict[str, str], artifacts: dict[str, str], files: list[str]) -> str:
        """Flush, log tags, artifacts (name → folder) and files, end the MLflow run and return its id."""
        self.flush()
        self.tracked.log_tags(tags)
        for path in files:
            self.tracked.log_file(path)
        for name, folder in artifacts.items():
            self.tracked.log_folder(folder, name)
        self.tracked.end(status)
        return self.tracked.run_id


def start_recorder(run: RunFolder, config: FinetuneConfig, tracking_uri: str, settings: str) -> ActorHandle:
    """Start the recorder on the driver's node, for the lifetime of the job; ``settings`` is a hash of the settings."""
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
    return actor.remote(run.path, tracked, config.model_dump(mode="json"), config.tracking.logging_steps, time.time())


def _read_rows(path: str) -> list[dict[str, Any]]:
    """Return the rows of a JSONL file; none when there is no file."""
    try:
        lines = read_stored(path).splitlines()
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in lines]
