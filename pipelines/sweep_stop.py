"""Ctrl-C and SIGTERM in a sweep: the first leaves it so that it goes on later, the second leaves at once."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from llava_ray.errors import Stopped
from pipelines.command import handling_signals

_STDERR = 2
LEAVING = "Stopping: trials end where they are, and go on from their last checkpoints. Once more to leave at once."
AT_ONCE = "Left at once. The same command goes on from what is done."


@contextmanager
def leaving() -> Iterator[None]:
    """Have the first signal raise Stopped wherever the block is, and the next one end the process.

    Tune must not take the first one: it would end the trials in order, as if they were not to go on.
    """
    received: list[int] = []

    def leave(number: int, frame: FrameType | None) -> None:
        del frame
        received.append(number)
        # Past the streams' buffers: the signal may have come in the middle of a line.
        os.write(_STDERR, f"\n{LEAVING if len(received) == 1 else AT_ONCE}\n".encode())
        if len(received) > 1:
            os._exit(128 + number)  # Ray's processes end with this one
        raise Stopped(signal_number=number)

    with handling_signals(leave):
        try:
            yield
        except BaseException as error:
            # Ray raises its own exception for a signal that came in one of its calls.
            if received and not isinstance(error, Stopped):
                raise Stopped(signal_number=received[0]) from error
            raise
