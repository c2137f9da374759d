"""Losses that are looked at every few steps, and rows that are copied ahead: with a device and an engine made up."""

import math
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llava_ray.config.train import TrainConfig
from llava_ray.errors import DivergedError
from llava_ray.objectives.cross_entropy import CrossEntropy
from llava_ray.train import loop as loops
from llava_ray.train import objective as rows_module
from llava_ray.train.loss_window import EndedStep, LossWindow
from llava_ray.train.nonfinite import StepEnd
from llava_ray.train.objective import RowsAhead, StepLoss
from llava_ray.train.speed import StepNotes

CPU, GPU = torch.device("cpu"), torch.device("cuda")
NOTES = StepNotes(1, 4, 2, 1e9, {"skipped_steps": 0.0}, None)


def make_window(device: torch.device = CPU, **settings: Any) -> LossWindow:
    return LossWindow(TrainConfig.parsed(settings), device)


def test_how_often_losses_are_looked_at() -> None:
    assert [make_window(device).size for device in (CPU, GPU)] == [1, 10]
    assert make_window(GPU, fetch_loss_steps=4).size == 4
    assert make_window(CPU, fetch_loss_steps=4).size == 4
    # Whether the step is taken follows from its loss.
    assert make_window(GPU, fetch_loss_steps=4, on_nonfinite="skip").size == 1


class Recorder:
    """What a loop tells the run's recorder, and when it saves."""

    def __init__(self) -> None:
        self.told: list[tuple[Any, ...]] = []
        self.record = SimpleNamespace(remote=lambda rank, step, metrics, ids: self.note(step, metrics["loss"], ids[0]))
        self.fail = SimpleNamespace(remote=lambda error: self.note("fail", str(error)))

    def note(self, *what: Any) -> bool:
        self.told.append(what)
        return False


def run_steps(losses: list[float], size: int, monkeypatch: pytest.MonkeyPatch, *, save_steps: int = 4) -> list[Any]:
    """Return what a loop does whose steps have these losses."""
    recorder = Recorder()
    loop = object.__new__(loops._Loop)
    loop.rollouts = None
    objective = CrossEntropy()

    def compute(step: int, batches: list[Any]) -> tuple[StepLoss, StepEnd]:
        step_loss = StepLoss(objective, CPU)
        step_loss.loss += losses[step]
        return step_loss, StepEnd([], skipped=False)

    def check(step: int, loss: float, end: StepEnd) -> DivergedError | None:
        return None if math.isfinite(loss) else DivergedError(f"step {step}: the loss is {loss}")

    parts = {
        "settings": SimpleNamespace(until=len(losses), stream=None, config=SimpleNamespace(train=TrainConfig())),
        "heart": SimpleNamespace(mark=lambda *_: None, phase_of=lambda *_: "", phase=""),
        "profiler": SimpleNamespace(start=lambda step: None, end=lambda step: None),
        "checkpointer": SimpleNamespace(
            is_due=lambda step: step % save_steps == 0 or step == len(losses),
            save=lambda step, judged: recorder.note("save", step, judged),
        ),
        "examiner": SimpleNamespace(evaluate=lambda engine, device: {"held_out_loss": 0.5}),
        "meter": SimpleNamespace(
            waiting=nullcontext, excluded_from_timing=nullcontext, phase=lambda name: nullcontext(),
            note=lambda *_: NOTES, take_seconds=lambda count: 1.0,
            measure=lambda loss, notes, seconds: {"loss": loss},
        ),
        "guard": SimpleNamespace(check=check), "window": make_window(fetch_loss_steps=size), "journal": recorder,
        "rank": 0, "world_size": 1, "device": CPU, "engine": None, "first_step": 0, "told": None, "_compute": compute,
    }  # fmt: skip
    vars(loop).update(parts)
    monkeypatch.setattr(loops, "iterate_steps", lambda *_: iter([[SimpleNamespace(ids=[n])] for n in range(99)]))
    monkeypatch.setattr(loops, "_agree_to_stop", lambda told, device: recorder.note("look"))
    monkeypatch.setattr(loops.ray, "get", lambda value: value)
    ended = loop.run(iter(()))
    assert ended == all(map(math.isfinite, losses))
    return recorder.told


def test_a_window_changes_when_steps_are_recorded_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    losses = [1.0, 0.7, 0.1, 1 / 3, 0.25, 0.6]
    found = {size: run_steps(losses, size, monkeypatch) for size in (1, 3, 10)}
    exact = [torch.tensor(loss).item() for loss in losses]
    for told in found.values():
        assert [one for one in told if isinstance(one[0], int)] == [(n, exact[n], n) for n in range(6)]
        assert [one for one in told if one[0] == "save"] == [("save", n, {"held_out_loss": 0.5}) for n in (4, 6)]
        assert told.index(("save", 4, {"held_out_loss": 0.5})) > told.index((3, exact[3], 3))  # with its rows known
    assert " ".join(str(one[0]) for one in found[1]) == "look 0 look 1 look 2 look 3 save look 4 look 5 save"
    assert " ".join(str(one[0]) for one in found[3]) == "look 0 1 2 look 3 save look 4 5 save"
    assert " ".join(str(one[0]) for one in found[10]) == "look 0 1 2 3 save look 4 5 save"


@pytest.mark.parametrize("size", [1, 3, 10])
def test_a_loss_that_is_not_finite_ends_the_run_before_anything_is_saved(
    size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = run_steps([1.0, 0.7, math.nan, 0.5, 0.5, 0.5], size, monkeypatch)
    assert [one for one in told if one[0] != "look"] == [
        (0, 1.0, 0),
        (1, torch.tensor(0.7).item(), 1),
        ("fail", "step 2: the loss is nan"),
    ]


def test_all_losses_are_fetched_at_once_and_exactly() -> None:
    window = make_window(fetch_loss_steps=3)
    values = torch.rand(3, generator=torch.Generator().manual_seed(0))
    for step, value in enumerate(values):
        losses = StepLoss(CrossEntropy(), CPU)
        losses.loss += value
        assert window.is_full == (step == 2)
        window.add(EndedStep(step, [], losses, StepEnd([], skipped=False), NOTES))
    assert [(ended.step, loss) for ended, loss, _ in window.fetch()] == [(n, values[n].item()) for n in range(3)]
    assert window.steps == []


class FakeStream:
    """A CUDA stream that notes what is asked of it."""

    def __init__(self, did: list[str]) -> None:
        self.did = did

    def record_event(self) -> str:
        return "arrived"

    def wait_event(self, event: str) -> None:
        self.did.append(event)


def test_the_next_row_is_copied_before_this_one_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    did: list[str] = []
    tensor = SimpleNamespace(record_stream=lambda stream: did.append("kept"))
    monkeypatch.setattr(rows_module.torch.cuda, "Stream", lambda device: FakeStream(did))
    monkeypatch.setattr(rows_module.torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(rows_module.torch.cuda, "current_stream", lambda device: FakeStream(did))
    copied = SimpleNamespace(tensors=lambda: [tensor])
    monkeypatch.setattr(rows_module, "copy_row", lambda batch, *_: did.append(f"copy {batch}") or copied)
    monkeypatch.setattr(rows_module, "finish_row", lambda *_: did.append("finish"))
    for batch, build in RowsAhead(None, None, GPU, lambda name: nullcontext()).of(["a", "b", "c"]):  # type: ignore[arg-type]
        build()
        did.append(f"compute {batch}")
    one = ["arrived", "kept", "finish"]
    assert did == [
        *["copy a", "copy b", *one, "compute a"],
        *["copy c", *one, "compute b", *one, "compute c"],
    ]


def test_a_cpu_builds_each_row_when_its_turn_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    did: list[str] = []
    monkeypatch.setattr(rows_module, "build_row", lambda batch, *_: did.append(f"build {batch}"))
    for batch, build in RowsAhead(None, None, CPU, lambda name: nullcontext()).of(["a", "b"]):  # type: ignore[arg-type]
        did.append(f"mark {batch}")
        build()
    assert did == ["mark a", "build a", "mark b", "build b"]
