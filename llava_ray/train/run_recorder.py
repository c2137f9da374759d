"""The run's only writer: every rank sends it each step's record; it writes metrics, ledger, MLflow and progress.

``ledger.jsonl`` has a line per step with the ids of its samples, sorted, whatever the number of ranks; a run that was
killed and resumed has the same bytes as one that never was. ``metrics.jsonl`` has a line per step with its metrics.
"""

import datetime
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from llava_ray.config.finetune import FinetuneConfig
from llava_ray.errors import LlavaRayError
from llava_ray.optional_trackers import Tracker, open_trackers, wandb_environment
from llava_ray.reading import describe_error
from llava_ray.train.rank_watch import Orders, Position, RankWatch
from llava_ray.train.runs import RunFolder
from llava_ray.train.step_file import StepFile, finite

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
    failure: LlavaRayError | None = None
    """Why the workers ended the run, if they did."""


class RunRecorder:
    """Collect the ranks' records; run as a Ray actor (see ``start_recorder``)."""

    def __init__(
        self,
        run_folder: str,
        tracked: dict[str, Any],
        params: dict[str, Any],
        logging_steps: int,
        environment: dict[str, str] | None = None,
        started: float | None = None,
    ) -> None:
        """Open the ledger and metrics that earlier starts of this run have written, and the trackers.

        ``environment`` holds variables for trackers beside MLflow, which ``params`` name; ``started`` is the time of
        this start.
        """
        from llava_ray.tracking import TrackedRun  # MLflow; whoever holds this actor's handle imports this module

        self.run_folder = run_folder
        self.tracked = TrackedRun(**tracked)
        self.tracked.log_params(params)
        names = params.get("tracking", {}).get("report_to", ())
        self.others = open_trackers(names, run_folder, tracked["experiment_name"], params, environment or {})
        self.logging_steps = logging_steps
        self.ledger = StepFile(f"{run_folder}/ledger.jsonl")
        self.metrics = StepFile(f"{run_folder}/metrics.jsonl")
        self.last = self.ledger.last
        """The last step that all ranks have recorded."""
        self.last_metrics = finite(self.metrics.read_last())
        self.unlogged: dict[int, dict[str, float]] = {}
        """Metrics that MLflow does not have yet."""
        self.partial: dict[int, dict[int, list[str]]] = {}
        self.log_time = time.monotonic()
        self.world_size = 0
        self.state = "starting workers"
        self.first: int | None = None
        self.ended: deque[tuple[int, float]] = deque(maxlen=_RATE_WINDOW)
        self.said: list[str] = []
        self.started = time.time() if started is None else started
        self.stepped = False
        self.stopping = False
        self.ranks = RankWatch()
        self.failure: LlavaRayError | None = None

    def enter(self, state: str) -> None:
        """Set the workers' current phase."""
        self.state = state

    def say(self, line: str) -> None:
        """Add a line for the person who started the run, once."""
        if line not in self.said:  # restarted workers send it again
            self.said.append(line)

    def beat(self, rank: int, position: Position) -> Orders:
        """Note where a rank is and return what it has to know."""
        return self.ranks.beat(rank, position)

    def report_hang(self, rank: int, stacks: str) -> None:
        """Note the stacks of a rank that has made no progress for too long."""
        self.ranks.add_stacks(rank, stacks)

    def tell_hang(self) -> None:
        """Say which ranks hang where, once all that answer have had the time to report."""
        described = self.ranks.describe_hang()
        if described is not None:
            self.say(f"No worker makes progress, so all are replaced and resume.\n{described}")

    def tell_failure(self, rank: int, told: str) -> str:
        """Say why a rank's worker failed and where it was; a hang has been described. Return it."""
        if self.ranks.stacks:
            return "no worker made progress"
        line = f"{told} (last seen: {self.ranks.describe(rank)})"
        self.say(line[0].upper() + line[1:])
        return line

    def fail(self, error: LlavaRayError) -> None:
        """Note why the workers end the run, all after the same step; the same settings would reach it again."""
        self.failure = error

    def stop(self) -> None:
        """Request a stop after the current step; the workers receive it as the answer to their next record."""
        self.stopping = True
        self.tracked.end("KILLED")  # at once: the driver may exit before the workers have stopped

    def rewind(self, rank: int, first_step: int, world_size: int) -> None:
        """Drop the records of steps that will be repeated; every rank calls this when it starts."""
        del rank
        self.world_size = world_size
        self.partial.clear()
        if self.metrics.last >= first_step:
            self.last_metrics = {}
        for file in (self.ledger, self.metrics):
            file.rewind(first_step)
        self.last_metrics = self.last_metrics or finite(self.metrics.read_last())
        self.unlogged = {step: row for step, row in self.unlogged.items() if step < first_step}
        self.last = min(self.last, first_step - 1)
        self.first = first_step
        self.ended.clear()

    def record(self, rank: int, step: int, metrics: dict[str, float], samples: list[str]) -> bool:
        """Record one rank's step; the last rank's record completes it. Return whether the run is to stop."""
        by_rank = self.partial.setdefault(step, {})
        by_rank[rank] = samples
        if rank == 0:
            self.metrics.add(step, metrics)
            self.unlogged[step] = finite(metrics)
        if len(by_rank) == self.world_size:
            samples = sorted(sample for ids in self.partial.pop(step).values() for sample in ids)
            self.ledger.add(step, {"samples": samples})
            self.last, self.last_metrics = step, self.unlogged.get(step, {})
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
        new = {step: row for step, row in self.unlogged.items() if step <= self.last}
        logged = {step: row for step, row in new.items() if step % self.logging_steps == 0}
        self.tracked.log_steps(logged)
        self._tell_others(lambda tracker: tracker.log_steps(logged))
        self.unlogged = {step: row for step, row in self.unlogged.items() if step > self.last}

    def _tell_others(self, tell: Callable[[Tracker], None]) -> None:
        """Tell the trackers beside MLflow something; one that fails is given up, and the run goes on."""
        for tracker in list(self.others):
            try:
                tell(tracker)
            except Exception as error:  # noqa: BLE001 - whatever a foreign library and its server raise
                self.others.remove(tracker)
                name = type(tracker).__name__
                self.say(f"{name} is not written to any more: {describe_error(error)}. MLflow has all metrics.")

    def flush(self, num_steps: int = 0) -> bool:
        """Append new rows to ledger and metrics; return only when they are on storage.

        With ``num_steps`` nothing is written, and False returned, before all ranks have recorded that many steps: a
        rank that saves a checkpoint after them may be ahead of the records of others.
        """
        if self.last + 1 < num_steps:
            return False
        self.ledger.flush()
        self.metrics.flush()
        self.log()
        return True

    def progress(self) -> RunProgress:
        """Return the run's progress."""
        rate = None
        if len(self.ended) > 1:
            (first, start), (end, now) = self.ended[0], self.ended[-1]
            rate = (end - first) / max(now - start, 1e-9)
        return RunProgress(
            self.state, self.first, self.last + 1, self.last_metrics, rate, list(self.said), self.failure
        )

    def close(self, status: str, tags: dict[str, str], artifacts: dict[str, str], files: list[str]) -> tuple[str, str]:
        """Flush, log tags, artifacts (name → folder) and files, end the MLflow run; return its id and experiment's."""
        self.flush()
        self.tracked.log_tags(tags)
        for path in files:
            self.tracked.log_file(path)
        for name, folder in artifacts.items():
            self.tracked.log_folder(folder, name)
        self.tracked.end(status)
        self._tell_others(lambda tracker: tracker.end(status))
        self.others = []
        return self.tracked.run_id, self.tracked.experiment_id


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
    environment = wandb_environment() if "wandb" in config.tracking.report_to else {}
    params = config.model_dump(mode="json")
    return actor.remote(run.path, tracked, params, config.tracking.logging_steps, environment, time.time())
