"""A step's phases: on the host's clock, with collectives apart, and on a GPU by events that nobody waits for."""

from typing import Any

import pytest
import torch

from llava_ray.train import phases
from llava_ray.train.phases import PHASES, PhaseClock


class Clock:
    """Time that passes only when told."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(phases, "time", clock)
    return clock


class Work:
    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.kind = "gloo"

    def wait(self) -> bool:
        self.clock.now += 0.25
        return True


class Backend:
    """DeepSpeed's, of which each call blocks for half a second."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def __getattr__(self, name: str) -> Any:
        if name == "all_gather_coalesced":  # another version has no such one
            raise AttributeError(name)

        def collective(*arguments: object, async_op: bool = False) -> Work | None:
            self.clock.now += 0.5
            return Work(self.clock) if async_op else None

        return collective


def test_collectives_inside_other_phases_count_as_communication(clock):
    measured, backend = PhaseClock(torch.device("cpu")), Backend(clock)
    measured.watch_collectives(backend)
    backend.broadcast()  # outside any phase
    for _ in range(2):
        with measured.phase("forward"):
            clock.now += 1
        with measured.phase("backward"):
            clock.now += 3
            backend.all_reduce()
            work = backend.reduce_scatter_tensor(async_op=True)
            assert (work.wait(), work.kind) == (True, "gloo")
    with measured.phase("communication"):
        clock.now += 2
        backend.all_reduce()
    with pytest.raises(KeyError), measured.phase("optimizer"):
        clock.now += 1
        raise KeyError
    found = measured.end_step()
    assert list(found) == [f"{name}_seconds" for name in PHASES]
    assert found == pytest.approx(
        {
            "copy_seconds": 0,
            "forward_seconds": 2,
            "backward_seconds": 6,
            "optimizer_seconds": 1,
            "communication_seconds": 2 * 1.25 + 2.5,
        }
    )
    assert set(measured.end_step().values()) == {0}


class Event:
    """A GPU's event: it passes only when the GPU gets there."""

    passed = 0
    made: list["Event"]

    def __init__(self, *, enable_timing: bool) -> None:
        assert enable_timing
        self.number = 0

    def record(self) -> None:
        Event.made.append(self)
        self.number = len(Event.made)

    def query(self) -> bool:
        return self.number <= Event.passed

    def synchronize(self) -> None:
        raise AssertionError("the host waits for the GPU")

    def elapsed_time(self, other: "Event") -> float:
        assert self.query() and other.query()
        return 1000.0 * (other.number - self.number)


def test_a_gpus_phases_are_read_when_they_have_passed(monkeypatch):
    Event.made = []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    measured = PhaseClock(torch.device("cuda"))

    def step() -> dict[str, float]:
        for name in ("copy", "forward", "backward", "forward"):
            with measured.phase(name):
                pass
        return measured.end_step()

    assert step() == {}
    Event.passed = 11  # the first step, and a part of the second
    assert step() == {
        "copy_seconds": 1,
        "forward_seconds": 2,
        "backward_seconds": 1,
        "optimizer_seconds": 0,
        "communication_seconds": 0,
    }
    Event.passed = 24
    step()
    assert not measured.steps
