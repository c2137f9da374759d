"""A trace of some steps, as torch's profiler sees them: written by each rank into the run's folder."""

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from llava_ray.data.storage import write_stored

PROFILE_FOLDER = "profile"
VIEWER = "https://ui.perfetto.dev"


class StepProfiler:
    """Profile the steps ``first`` to ``last`` of one rank, numbered as in metrics.jsonl."""

    def __init__(
        self,
        steps: tuple[int, int] | None,
        run_folder: str,
        rank: int,
        say: Callable[[str], object] = lambda line: None,
    ) -> None:
        """Profile nothing with None; ``say`` tells the person who started the run where the traces are."""
        self.steps = steps
        self.folder = f"{run_folder}/{PROFILE_FOLDER}"
        self.rank = rank
        self.say = say
        self.running: profile | None = None
        self.first = 0

    def start(self, step: int) -> None:
        """Begin before the first of the steps, or before one of them where the run resumes at it."""
        if self.steps is None or self.running is not None or not self.steps[0] <= step <= self.steps[1]:
            return
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
        self.running, self.first = profile(activities=activities), step
        self.running.start()

    def end(self, step: int) -> None:
        """Write the trace after the last of the steps."""
        if self.running is None or self.steps is None or step < self.steps[1]:
            return
        self.running.stop()
        name = f"steps-{self.first:08d}-{step:08d}-rank{self.rank}.json.gz"
        with tempfile.TemporaryDirectory() as folder:
            local = Path(folder, name)
            self.running.export_chrome_trace(str(local))
            write_stored(f"{self.folder}/{name}", local.read_bytes())
        self.running = None
        if self.rank == 0:
            self.say(f"Profile of the steps {self.first} to {step}: {self.folder} (open a file of it in {VIEWER})")
