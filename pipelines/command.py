"""Execution of pipelines as commands: errors in one line, Ctrl-C without a traceback."""

import argparse
import atexit
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import NoReturn

from llava_ray import invocation
from llava_ray.errors import ConfigError, LlavaRayError, Stopped

SIGNALS = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}
_INTERRUPTED = 130  # the shell's own code for Ctrl-C
_PARTIAL = 3
_OF_SIGNALS = 128  # plus the signal's number: the shell's convention
RESUMABLE = "Stopped. The same command goes on from what is done."


def run_command(
    main: Callable[[Sequence[str]], object], arguments: Sequence[str] | None = None, *, when_stopped: str = RESUMABLE
) -> None:
    """Run ``main`` on arguments; exit with 1 and one line for what a user can mend.

    Without ``arguments`` a script was started, and its command line is taken. ``when_stopped`` is said after Ctrl-C and
    SIGTERM, where ``main`` says nothing better.
    """
    signal.signal(signal.SIGTERM, stop)
    if arguments is None:
        os.environ[invocation.STARTED_AS_VARIABLE] = invocation.SCRIPT
        arguments = sys.argv[1:]
    try:
        main(arguments)
    except LlavaRayError as error:
        sys.exit(f"{type(error).__name__}: {error}")
    except BrokenPipeError:  # the reader of the output, such as head, has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt as interrupt:
        print(str(interrupt) or when_stopped, file=sys.stderr)
        end(interrupt.exit_code if isinstance(interrupt, Stopped) else _INTERRUPTED)


def exit_unless_complete(*, complete: bool, number: int) -> None:
    """Exit for a partial result: with 128 and the ``number`` of the signal that stopped it, otherwise with 3."""
    if not complete:
        sys.exit(_OF_SIGNALS + number if number else _PARTIAL)


def end(code: int) -> NoReturn:
    """End the process once its exit functions have run.

    The interpreter is not taken apart: with torch and Ray imported that is seconds of work for nothing, and their
    threads, which still run, may crash in it.
    """
    try:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def stop(number: int, frame: FrameType | None) -> None:
    """Handle SIGTERM like Ctrl-C."""
    del frame
    raise Stopped(signal_number=number)


@contextmanager
def handling_signals(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Install a handler of Ctrl-C and SIGTERM until the block ends; none outside the main thread, which alone may."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in SIGNALS}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


@dataclass(frozen=True)
class DryRun:
    """The dry-run flags: whether to describe a run only, and the GPU memory or cluster that it has to fit."""

    dry_run: bool
    gpu_memory_gib: float | None
    cluster_file: str | None


def split_dry_run(arguments: Sequence[str]) -> tuple[DryRun, list[str]]:
    """Parse ``--dry-run`` and its flags from a command line, and return the other arguments."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--dry-run", "--dry_run", action="store_true")
    parser.add_argument("--gpu_memory_gib", type=float)
    parser.add_argument("--cluster_file")
    asked, others = parser.parse_known_args(list(arguments))
    for name in ("gpu_memory_gib", "cluster_file"):
        if getattr(asked, name) is not None and not asked.dry_run:
            raise ConfigError(f"--{name} says into what --dry-run has to fit the run: give both, or neither")
    return DryRun(asked.dry_run, asked.gpu_memory_gib, asked.cluster_file), others


@contextmanager
def timed(stage: str, seconds: dict[str, float]) -> Iterator[None]:
    """Print the start of a stage, and record its duration."""
    print(f"\n== {stage}", flush=True)
    start = time.perf_counter()
    yield
    seconds[stage] = round(time.perf_counter() - start, 1)


def spaced(doc: str | None) -> str:
    """Put each example command of a docstring into a paragraph of its own, which a help page keeps apart."""
    return (doc or "").replace("\npython ", "\n\npython ")
