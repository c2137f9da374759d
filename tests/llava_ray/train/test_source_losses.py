"""Losses by source: shares that add up to a step's loss, and means over each source's own terms."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from llava_ray.objectives.cross_entropy import CrossEntropy
from llava_ray.objectives.objective import ObjectiveOutput
from llava_ray.train.held_out_sets import HeldOutSets
from llava_ray.train.objective import StepLoss
from llava_ray.train.source_losses import SourceLosses

CPU = torch.device("cpu")


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand in for a lone rank."""
    monkeypatch.setattr(dist, "all_reduce", lambda tensor, *args: None)


def make_batch(sources: list[int], lengths: list[int], total: int) -> SimpleNamespace:
    return SimpleNamespace(sources=sources, num_tokens=lengths, num_supervised=total, num_pairs=0, num_chosen=0)


@pytest.mark.usefixtures("alone")
def test_shares_add_up_and_means_are_of_each_sources_own_terms():
    draw = torch.Generator().manual_seed(0)
    rows = [([0, 2, 0], [5, 3, 4]), ([2], [6]), ([], [])]
    outputs, by_source, total = [], {0: [], 2: []}, 0
    for sources, lengths in rows:
        positions = torch.arange(sum(lengths))[torch.rand(sum(lengths), generator=draw) < 0.7]
        losses = torch.rand(len(positions), generator=draw) * 5
        owner = torch.repeat_interleave(
            torch.tensor(sources, dtype=torch.int64), torch.tensor(lengths, dtype=torch.int64)
        )
        for loss, source in zip(losses.tolist(), owner[positions].tolist(), strict=True):
            by_source[source].append(loss)
        outputs.append(ObjectiveOutput(losses, positions))
        total += len(positions)
    step = StepLoss(CrossEntropy(), CPU, ["a", "b", "c"])
    for output, (sources, lengths) in zip(outputs, rows, strict=True):
        step.add(output, make_batch(sources, lengths, total))
    step.reduce()
    loss, *values = step.values.tolist()
    named = step.name_values(loss, values)
    assert math.fsum(named[f"loss_share/{name}"] for name in "abc") == pytest.approx(loss, rel=1e-12)
    assert loss == step.loss.item()
    for source, name in ((0, "a"), (2, "c")):
        assert named[f"loss/{name}"] == pytest.approx(sum(by_source[source]) / len(by_source[source]), rel=1e-6)
        assert named[f"loss_share/{name}"] == pytest.approx(sum(by_source[source]) / total, rel=1e-6)
    assert math.isnan(named["loss/b"])
    assert named["loss_share/b"] == 0.0


@pytest.mark.usefixtures("alone")
def test_terms_of_two_kinds_have_divisors_of_their_own():
    losses = SourceLosses(["a", "b"], CPU)
    output = ObjectiveOutput(torch.tensor([2.0, 4.0, 1.0]), torch.tensor([0, 1, 3]))
    losses.add(output, torch.tensor([4.0, 4.0, 2.0]), make_batch([0, 1], [2, 2], 0))
    named = losses.name_values(2.0, losses.values.tolist())
    assert named == {"loss/a": 3.0, "loss_share/a": 1.5, "loss/b": 1.0, "loss_share/b": 0.5}


@pytest.mark.usefixtures("alone")
def test_a_loss_that_is_not_finite_is_named_beside_its_source():
    losses = SourceLosses(["a", "b"], CPU)
    output = ObjectiveOutput(torch.tensor([math.nan, 1.0]), torch.tensor([0, 2]))
    losses.add(output, 2.0, make_batch([0, 1], [2, 2], 0))
    named = losses.name_values(math.nan, losses.values.tolist())
    assert math.isnan(named["loss/a"])
    assert (named["loss/b"], named["loss_share/b"]) == (1.0, 0.5)


def test_without_a_mixture_there_is_nothing():
    step = StepLoss(CrossEntropy(), CPU)
    step.add(
        ObjectiveOutput(torch.tensor([2.0]), torch.tensor([0])),
        SimpleNamespace(num_supervised=1, num_pairs=0, num_chosen=0),
    )
    assert step.values.dtype == torch.float32
    assert step.name_values(2.0, []) == {}


def test_held_out_metrics_are_of_each_source_and_of_the_run():
    def make(sums: list[float]) -> SimpleNamespace:
        def name_sums(sums: list[float]) -> dict[str, float]:
            return {"held_out_loss": sums[0] / sums[1]}

        return SimpleNamespace(sum_up=lambda engine, device: sums, name_sums=name_sums)

    sets = HeldOutSets((), None, None, 0, 1)
    assert sets.evaluate(None, CPU) == {}
    sets.sets = [("a", make([6.0, 2.0])), ("b", make([2.0, 2.0]))]
    assert sets.evaluate(None, CPU) == {"held_out_loss": 2.0, "held_out_loss/a": 3.0, "held_out_loss/b": 1.0}
    sets.sets = [(None, make([5.0, 1.0])), *sets.sets]
    assert sets.evaluate(None, CPU) == {"held_out_loss": 5.0, "held_out_loss/a": 3.0, "held_out_loss/b": 1.0}
