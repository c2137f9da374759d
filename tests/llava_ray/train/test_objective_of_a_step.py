"""How a step's losses become one number, for cross-entropy and for an objective that a test makes up."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from llava_ray.objectives.cross_entropy import CrossEntropy
from llava_ray.objectives.objective import ObjectiveOutput
from llava_ray.train.held_out import HeldOutEvaluator
from llava_ray.train.objective import StepLoss


class Pairs:
    """An objective over pairs, with a metric of its own: another normalisation than that of tokens."""

    num_kinds = 1
    metric_names = ("won",)

    def compute(self, model, row) -> ObjectiveOutput:
        losses = model(row.input_ids)
        return ObjectiveOutput(losses, torch.arange(len(losses)), {"won": (losses < 1).float().sum()})

    def num_step_terms(self, totals) -> tuple[int, ...]:
        return (totals.num_pairs,)


class Engine:
    """Three pairs in every row."""

    def eval(self) -> None: ...

    def train(self) -> None: ...

    def __call__(self, input_ids: torch.Tensor) -> torch.Tensor:
        return torch.tensor([0.5, 2.0, 1.5])


@pytest.fixture
def reduced(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """What a lone rank was asked to reduce."""
    seen: list[torch.Tensor] = []
    monkeypatch.setattr(dist, "all_reduce", lambda tensor, *args: seen.append(tensor))
    return seen


def test_a_steps_loss_is_bit_equal_to_the_sum_of_its_parts(reduced: list[torch.Tensor]) -> None:
    rows = [torch.randn(size, generator=torch.Generator().manual_seed(size)).abs() for size in (7, 0, 501, 64)]
    batch = SimpleNamespace(num_supervised=sum(map(len, rows)), num_pairs=0, num_chosen=0)
    step, expected = StepLoss(CrossEntropy(), torch.device("cpu")), torch.zeros(())
    for losses in rows:
        part = step.add(ObjectiveOutput(losses, torch.arange(len(losses))), batch)
        micro_loss = losses.sum() / batch.num_supervised
        expected += micro_loss.detach()
        assert torch.equal(part, micro_loss)
    step.reduce()
    assert step.read() == (expected.item(), {})
    assert len(reduced) == 1, "no other collective than that of the loss"


def test_another_objective_brings_its_normalisation_and_its_metrics(reduced: list[torch.Tensor]) -> None:
    step, objective = StepLoss(Pairs(), torch.device("cpu")), Pairs()
    for losses in ([0.5, 2.0], [0.25]):
        row = SimpleNamespace(input_ids=torch.tensor(losses))
        step.add(objective.compute(lambda ids: ids, row), SimpleNamespace(num_supervised=0, num_pairs=4, num_chosen=0))
    step.reduce()
    assert step.read() == (pytest.approx(2.75 / 4), {"won": 0.5})
    assert len(reduced) == 2


def test_held_out_samples_are_evaluated_with_the_runs_objective(reduced: list[torch.Tensor]) -> None:
    evaluator = HeldOutEvaluator(None, SimpleNamespace(), Pairs(), 0, 1)
    evaluator.held_out = SimpleNamespace()
    ids = torch.zeros(1, 3, dtype=torch.int64)
    batch = SimpleNamespace(input_ids=ids, position_ids=ids, labels=ids, image_sizes=[], pairs=[], reference=None)
    evaluator.batches = [(batch, None), (batch, None)]
    found = evaluator.evaluate(Engine(), torch.device("cpu"))
    assert found == {"held_out_loss": pytest.approx(4 / 3), "held_out_won": pytest.approx(1 / 3)}
