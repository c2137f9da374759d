"""How every pipeline runs as a command: faults in one line, Ctrl-C without a traceback."""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from llava_ray.errors import LlavaRayError

INTERRUPTED = 130  # the shell's own code for Ctrl-C
RESUMABLE = "Stopped. The same command goes on from what is done."


def run_command(main: Callable[[Sequence[str]], object], *, when_stopped: str = RESUMABLE) -> None:
    """Run ``main`` on the command line's arguments; exit with 1 and one line for what a user can mend.

    ``when_stopped`` is said after Ctrl-C.
    """
    try:
        main(sys.argv[1:])
    except LlavaRayError as error:
        sys.exit(f"{type(error).__name__}: {error}")
    except KeyboardInterrupt:
        print(when_stopped, file=sys.stderr)
        sys.exit(INTERRUPTED)


@contextmanager
def timed(stage: str, seconds: dict[str, float]) -> Iterator[None]:
    """Say that a stage begins, and note how long it took."""
    print(f"\n== {stage}", flush=True)
    start = time.perf_counter()
    yield
    seconds[stage] = round(time.perf_counter() - start, 1)
