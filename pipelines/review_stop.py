"""Ctrl-C and SIGTERM in a review: the first stops new calls, the second exits at once."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from llava_ray.review.pool import Progress
from pipelines.command import SIGNALS, handling_signals


@contextmanager
def stopping(progress: Progress) -> Iterator[None]:
    """Install handlers: the first signal stops a job gracefully, the next raises KeyboardInterrupt.

    The handler says nothing itself: it may have come in the middle of a line.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        del frame
        if progress.signal:
            raise KeyboardInterrupt
        progress.signal = number
        progress.stopped = progress.stopped or f"it was stopped by {SIGNALS[signal.Signals(number)]}"

    with handling_signals(stop):
        yield
