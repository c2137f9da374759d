"""Ctrl-C and SIGTERM in a review: the first stops new calls, the second exits at once."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from llava_ray.review.pool import Progress

_SIGNALS = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}


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
        progress.stopped = progress.stopped or f"it was stopped by {_SIGNALS[signal.Signals(number)]}"

    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield
        return
    before = {number: signal.signal(number, stop) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
