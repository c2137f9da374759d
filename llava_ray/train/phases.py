"""The time of a step by phase, in seconds: copy, forward, backward, optimizer, communication.

On a CPU the host's clock measures them, and collectives inside another phase count as communication. On a GPU events
in the stream do, which are read once they have passed: the host never waits, so the numbers are those of the last step
that the GPU has finished. There communication is what stands outside the backward pass; what runs beside it is hidden.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

PHASES = ("copy", "forward", "backward", "optimizer", "communication")
_COMMUNICATION = "communication"

# The collectives of DeepSpeed's backend.
_COLLECTIVES = (
    "all_reduce",
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_coalesced",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_tensor",
    "broadcast",
    "barrier",
    "all_to_all_single",
)
_LONGEST_QUEUE = 64  # steps whose events have not passed yet

Mark = tuple[str, torch.cuda.Event, torch.cuda.Event]


class PhaseClock:
    """Measure the phases of one rank's steps."""

    def __init__(self, device: torch.device) -> None:
        """Measure nothing yet."""
        self.on_gpu = device.type == "cuda"
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self.marks: list[Mark] = []
        self.steps: deque[list[Mark]] = deque(maxlen=_LONGEST_QUEUE)
        self.latest: dict[str, float] = {}
        self.waited = 0.0
        """Seconds in collectives inside the phase that runs."""

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure the block as the phase ``name``; an error ends it too."""
        if self.on_gpu:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            yield
            end.record()
            self.marks.append((name, start, end))
            return
        self.waited = 0.0
        begun = time.perf_counter()
        try:
            yield
        finally:
            passed = time.perf_counter() - begun
            waited, self.waited = min(self.waited, passed), 0.0
            self.seconds[name] += passed - waited
            self.seconds[_COMMUNICATION] += waited

    def end_step(self) -> dict[str, float]:
        """Return the seconds of each phase, by ``<phase>_seconds``: of this step, or on a GPU of the last one known."""
        if not self.on_gpu:
            found, self.seconds = self.seconds, dict.fromkeys(PHASES, 0.0)
            return {f"{name}_seconds": seconds for name, seconds in found.items()}
        self.steps.append(self.marks)
        self.marks = []
        while self.steps and all(end.query() for _, _, end in self.steps[0]):
            passed = dict.fromkeys(PHASES, 0.0)
            for name, start, end in self.steps.popleft():
                passed[name] += start.elapsed_time(end) / 1000
            self.latest = {f"{name}_seconds": seconds for name, seconds in passed.items()}
        return self.latest

    def watch_collectives(self, backend: Any) -> None:
        """Measure how long the collectives of DeepSpeed's ``backend`` block a process without a GPU."""
        if not self.on_gpu:
            for name in _COLLECTIVES:
                if hasattr(backend, name):
                    setattr(backend, name, self._timed(getattr(backend, name)))

    def _timed(self, collective: Callable[..., Any]) -> Callable[..., Any]:
        """Return a collective that adds the time in which it, or the wait for it, blocks."""

        def timed(*arguments: Any, **named: Any) -> Any:
            begun = time.perf_counter()
            try:
                result = collective(*arguments, **named)
            finally:
                self.waited += time.perf_counter() - begun
            return _TimedWork(result, self) if hasattr(result, "wait") else result

        return timed


class _TimedWork:
    """A collective under way, whose wait is measured."""

    def __init__(self, work: Any, clock: PhaseClock) -> None:
        """Wrap what torch returned."""
        self.work = work
        self.clock = clock

    def wait(self, *arguments: Any) -> Any:
        """Wait for the collective."""
        begun = time.perf_counter()
        try:
            return self.work.wait(*arguments)
        finally:
            self.clock.waited += time.perf_counter() - begun

    def __getattr__(self, name: str) -> Any:
        """Return any other attribute of what was wrapped."""
        return getattr(self.work, name)
