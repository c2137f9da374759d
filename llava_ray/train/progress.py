"""What the driver does beside the run: draw its progress, and close its MLflow run if it does not end well."""

import contextlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError
from tqdm import tqdm

from llava_ray.log_file import terminal
from llava_ray.train.run_recorder import RunProgress

_PROGRESS_SECONDS = 0.5
_LOGGED_PROGRESS_SECONDS = 10.0  # where lines go to a file, each one stays
_SHOWN_METRICS = ("loss", "samples_per_second")


@contextmanager
def closing_run(journal: ActorHandle) -> Iterator[None]:
    """Mark the run FAILED or KILLED in MLflow when it does not end well."""
    try:
        yield
    except BaseException as error:
        status = "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED"
        with contextlib.suppress(RayError):  # the journal may be gone with the cluster
            ray.get(journal.close.remote(status, {}, {}, []))
        raise


class StepBar(tqdm):
    """A bar that is told how fast the run is: its own guess would count the time until the first step."""

    steps_per_second: float | None = None

    @property
    def format_dict(self) -> dict[str, Any]:
        """Return what the bar shows; no rate is none, not 0."""
        return {**super().format_dict, "rate": self.steps_per_second or 0.0}

    def show(self, standing: RunProgress) -> None:
        """Draw how far the run is."""
        self.set_description(standing.state, refresh=False)
        shown = {key: f"{standing.metrics[key]:.3g}" for key in _SHOWN_METRICS if key in standing.metrics}
        self.set_postfix(shown, refresh=False)
        self.steps_per_second = standing.steps_per_second
        if standing.first is not None:
            self.n = standing.done  # may go back: a run that lost a worker repeats the steps since its checkpoint
        self.refresh()


@contextmanager
def progress_bar(journal: ActorHandle, num_steps: int, first_step: int) -> Iterator[None]:
    """Draw the run's progress, from the step that it goes on with, until the block ends."""
    ended, screen = threading.Event(), terminal()

    def draw() -> None:
        pause = _PROGRESS_SECONDS if screen.isatty() else _LOGGED_PROGRESS_SECONDS
        over, said = False, 0
        look = {"unit": "step", "desc": "starting workers", "dynamic_ncols": True, "file": screen}
        with StepBar(total=num_steps, initial=first_step, **look) as bar:
            while not over:
                over = ended.wait(pause)
                standing: RunProgress = ray.get(journal.progress.remote())
                for line in standing.said[said:]:
                    bar.write(line)
                said = len(standing.said)
                bar.show(standing)

    thread = threading.Thread(target=draw, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
