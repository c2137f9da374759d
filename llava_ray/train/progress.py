"""What the driver does beside the run: draw its progress, and close its MLflow run if it does not end well."""

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import ray
from ray.actor import ActorHandle
from tqdm import tqdm

from llava_ray.errors import LlavaRayError

PROGRESS_SECONDS = 0.5
LOGGED_PROGRESS_SECONDS = 10.0  # where lines go to a file, each one stays
SHOWN_METRICS = ("loss", "samples_per_second")


@contextmanager
def closing(journal: ActorHandle) -> Iterator[None]:
    """Mark the run FAILED or KILLED in MLflow when it does not end well."""
    try:
        yield
    except KeyboardInterrupt:
        ray.get(journal.close.remote("KILLED", {}, {}, []))
        raise
    except LlavaRayError:
        ray.get(journal.close.remote("FAILED", {}, {}, []))
        raise


@contextmanager
def progress_bar(journal: ActorHandle, num_steps: int) -> Iterator[None]:
    """Draw the run's progress until the block ends."""
    ended = threading.Event()

    def draw() -> None:
        pause = PROGRESS_SECONDS if sys.stderr.isatty() else LOGGED_PROGRESS_SECONDS
        over = False
        with tqdm(total=num_steps, unit="step", desc="starting", dynamic_ncols=True) as bar:
            while not over:
                over = ended.wait(pause)
                state, done, metrics = ray.get(journal.progress.remote())
                bar.set_description(state, refresh=False)
                bar.set_postfix({key: f"{metrics[key]:.3g}" for key in SHOWN_METRICS if key in metrics}, refresh=False)
                bar.n = done  # may go back: a run that lost a worker repeats the steps since its checkpoint
                bar.refresh()

    thread = threading.Thread(target=draw, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
