"""The driver's part of a run: its progress bar, and its MLflow run's status if it fails."""

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
    """Mark the run FAILED or KILLED in MLflow when the block raises."""
    try:
        yield
    except BaseException as error:
        status = "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED"
        with contextlib.suppress(RayError):  # the recorder may be gone with the cluster
            ray.get(journal.close.remote(status, {}, {}, []))
        raise


class StepBar(tqdm):
    """A bar whose rate is set from outside: tqdm's own would count the time until the first step."""

    steps_per_second: float | None = None

    @property
    def format_dict(self) -> dict[str, Any]:
        """Return tqdm's fields with the run's own rate; an unknown rate is 0, which tqdm draws as "?"."""
        return {**super().format_dict, "rate": self.steps_per_second or 0.0}

    def show(self, progress: RunProgress) -> None:
        """Draw the run's progress."""
        self.set_description(progress.state, refresh=False)
        postfix = {key: f"{progress.metrics[key]:.3g}" for key in _SHOWN_METRICS if key in progress.metrics}
        self.set_postfix(postfix, refresh=False)
        self.steps_per_second = progress.steps_per_second
        if progress.first is not None:
            self.n = progress.done  # may go back: a run that lost a worker repeats the steps since its checkpoint
        self.refresh()


@contextmanager
def progress_bar(journal: ActorHandle, num_steps: int, first_step: int) -> Iterator[None]:
    """Draw the run's progress, from the step at which it resumes, until the block ends."""
    ended, screen = threading.Event(), terminal()

    def draw() -> None:
        pause = _PROGRESS_SECONDS if screen.isatty() else _LOGGED_PROGRESS_SECONDS
        done, num_printed = False, 0
        options = {"unit": "step", "desc": "starting workers", "dynamic_ncols": True, "file": screen}
        with StepBar(total=num_steps, initial=first_step, **options) as bar:
            while not done:
                done = ended.wait(pause)
                progress: RunProgress = ray.get(journal.progress.remote())
                for line in progress.said[num_printed:]:
                    bar.write(line)
                num_printed = len(progress.said)
                bar.show(progress)

    thread = threading.Thread(target=draw, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
