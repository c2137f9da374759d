"""Ctrl-C and SIGTERM in a sweep: the first leaves it so that it goes on later, the second leaves at once."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from llava_ray.errors import Stopped

SIGNALS = (signal.SIGINT, signal.SIGTERM)
STDERR = 2
LEAVING = "Stopping: trials end where they are, and go on from their last checkpoints. Once more to leave at once."
AT_ONCE = "Left at once. The same command goes on from what is done."


@contextmanager
def leaving() -> Iterator[None]:
    """Have the first signal raise Stopped wherever the block is, and the next one end the process.

    Tune must not take the first one: it would end the trials in order, as if they were not to go on.
    """
    heard: list[int] = []

    def leave(number: int, frame: FrameType | None) -> None:
        del frame
        heard.append(number)
        # Past the streams' buffers: the signal may have come in the middle of a line.
        os.write(STDERR, f"\n{LEAVING if len(heard) == 1 else AT_ONCE}\n".encode())
        if len(heard) > 1:
            os._exit(128 + number)  # Ray's processes end with this one
        raise Stopped(signal_number=number)

    if threading.current_thread() is not threading.main_thread():  # only the main one may set handlers
        yield
        return
    before = {number: signal.signal(number, leave) for number in SIGNALS}
    try:
        yield
    except BaseException as error:
        if heard and not isinstance(error, Stopped):  # Ray's own exception for a signal that came in one of its calls
            raise Stopped(signal_number=heard[0]) from error
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
