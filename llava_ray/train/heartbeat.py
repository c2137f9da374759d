"""A thread beside a worker's loop: it reports where the loop is, and ends a worker in which nothing happens any more.

A collective of which one rank is missing blocks the others for half an hour (NCCL, gloo). Here each rank notices after
``run.hang_minutes`` that no rank makes progress, sends the stacks of its threads to the recorder, and exits; Ray Train
then replaces all workers, those that do not answer too, and they resume from the last checkpoint.
"""

import os
import platform
import resource
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError

from llava_ray.train.rank_watch import STACKS_BEATS, Orders, Position
from llava_ray.train.run_recorder import TRAINING

_SECONDS_A_BEAT = 5.0
_BEATS_A_LIMIT = 24  # at least: short limits have short heartbeats
_PATIENT = 8  # times longer while loading and saving, which have no steps to measure by; NCCL waits 30 minutes
_SLOWEST = 10  # times the longest step so far is not yet a hang
_FRAMES = 24  # of the loop's thread; others show their last few
_FRAMES_OF_OTHERS = 4


class Patience:
    """Count the heartbeats for which a rank has seen no progress, and find whether they are too many."""

    def __init__(self, limit: int) -> None:
        """Begin with nothing seen; ``limit`` heartbeats without progress are too long while training."""
        self.limit = limit
        self.seen: tuple[int, int] = (-1, -1)
        self.idle = 0
        self.longest = 0

    def is_over(self, marks: int, orders: Orders, *, training: bool) -> bool:
        """Note one heartbeat; return whether no rank has made progress for too long.

        A rank that does not answer halves the time: nothing else explains the others' waiting.
        """
        seen = (marks, orders.total_marks)
        if seen != self.seen:
            self.longest = max(self.longest, self.idle) if training else self.longest
            self.seen, self.idle = seen, 0
            return False
        self.idle += 1
        limit = self.limit // 2 if orders.silent else self.limit
        return self.idle >= (max(limit, _SLOWEST * self.longest) if training else limit * _PATIENT)


class Heartbeat:
    """Report one rank's position and watch its loop."""

    def __init__(
        self, journal: ActorHandle, rank: int, minutes: float, leave: Callable[[], None] | None = None
    ) -> None:
        """Store whom to report to; ``minutes`` without progress are too long, 0 for any time."""
        self.journal = journal
        self.rank = rank
        self.seconds = min(_SECONDS_A_BEAT, minutes * 60 / _BEATS_A_LIMIT) if minutes else _SECONDS_A_BEAT
        self.patience = Patience(max(2, round(minutes * 60 / self.seconds)))
        self.endless = not minutes
        self.leave = leave or _exit
        self.process = f"pid {os.getpid()} on {platform.node()}"
        self.marks = 0
        self.phase = "starting"
        self.doing = "starting"
        self.loop = threading.get_ident()
        self.ended = threading.Event()
        self.total = 0

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch the calling thread until the block ends."""
        self.loop = threading.get_ident()
        thread = threading.Thread(target=self._watch, daemon=True, name="heartbeat")
        thread.start()
        try:
            yield
        finally:
            self.ended.set()

    def enter(self, phase: str) -> None:
        """Note that the loop enters a phase that is not made of steps, and tell the recorder."""
        self.mark(phase, phase)
        self.journal.enter.remote(phase)

    def phase_of(self, step: int, first_step: int) -> str:
        """Return the phase of a step: the first after a start also waits for decoders, and compiles."""
        return TRAINING if step > first_step else "first step"

    def mark(self, phase: str, doing: str) -> None:
        """Note that the loop has made progress: its phase, and what it does now."""
        self.phase, self.doing = phase, doing
        self.marks += 1

    def _watch(self) -> None:
        """Send heartbeats until the block ends or the run hangs."""
        while not self.ended.wait(self.seconds):
            marks = self.marks
            orders = self._beat(marks)
            training = self.phase == TRAINING
            over = self.patience.is_over(marks, orders, training=training)
            if (over or orders.send_stacks) and not self.endless and not self.ended.is_set():
                self._report_and_leave()
                return

    def _beat(self, marks: int) -> Orders:
        """Send a heartbeat; without an answer this rank goes by its own loop alone."""
        position = Position(self.process, marks, self.doing, describe_memory())
        try:
            orders: Orders = ray.get(self.journal.beat.remote(self.rank, position), timeout=self.seconds)
        except RayError:  # its timeout too: the recorder is gone, or hangs itself
            return Orders(self.total)
        self.total = orders.total_marks
        return orders

    def _report_and_leave(self) -> None:
        """Send this rank's stacks, give the other ranks the time to send theirs, and end the process."""
        stacks = describe_stacks(self.loop)
        print(f"rank {self.rank} hangs: {self.doing}\n{stacks}", file=sys.stderr, flush=True)  # noqa: T201
        try:
            ray.get(self.journal.report_hang.remote(self.rank, stacks), timeout=self.seconds)
            self.ended.wait(STACKS_BEATS * self.seconds)
            ray.get(self.journal.tell_hang.remote(), timeout=self.seconds)
        except RayError:  # the lines above are in the log all the same
            pass
        self.leave()


def _exit() -> None:
    """End the process at once: its loop is inside a call that no exception reaches."""
    os._exit(1)


def describe_stacks(first: int) -> str:
    """Return the stacks of this process's Python threads, that of thread ``first`` in full, without the caller's."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    frames = sys._current_frames()
    order = sorted(frames, key=lambda ident: (ident != first, names.get(ident, "")))
    lines = []
    for ident in order:
        if ident == threading.get_ident():
            continue
        shown = traceback.extract_stack(frames[ident])[-(_FRAMES if ident == first else _FRAMES_OF_OTHERS) :]
        lines.append(f"  thread {names.get(ident, ident)}:")
        lines += [f"    {frame.filename}:{frame.lineno} in {frame.name}: {frame.line}" for frame in shown]
    return "\n".join(lines)


def describe_memory() -> str:
    """Return this process's largest resident set and what its machine has left, in words."""
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) / 2**20
    except (OSError, StopIteration, ValueError):
        return f"{largest:.1f} GiB at most"
    return f"{largest:.1f} GiB at most, {free:.1f} GiB free on its node"
