"""GRPO against TRL's loss, gradients and metrics of the same answers, packed and dealt to ranks as in a run."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from grpo_vectors import GOLDEN, LONGEST, NUM_STEPS, VOCABULARY, make_step

from llava_ray.config.grpo import GrpoConfig
from llava_ray.data.row_assignment import SampleCost
from llava_ray.generate.group_sampling import SampledAnswer
from llava_ray.objectives.grpo import Grpo, compute_token_kl
from llava_ray.objectives.objective import PackedRow
from llava_ray.train.objective import StepLoss
from llava_ray.train.rollouts.answered import AskedQuestion, RolloutGroup
from llava_ray.train.rollouts.rows import (
    RolloutSample,
    deal_samples,
    find_ledger_ids,
    make_batches,
    make_samples,
    move_terms,
)

CPU = torch.device("cpu")


class KnownLogits(torch.nn.Module):
    """A model that gives the tokens of answer n the step's logits: an answer's prompt is one token, its number."""

    def __init__(self, logits: np.ndarray, dtype: torch.dtype) -> None:
        super().__init__()
        self.logits = torch.nn.Parameter(torch.from_numpy(logits).to(dtype))

    def forward(self, input_ids, position_ids, predicting, **images):
        starts = (position_ids[0] == 0).nonzero().squeeze(1)
        owner = starts[(position_ids[0] == 0).cumsum(0) - 1]
        return self.logits[input_ids[0, owner[predicting]], position_ids[0, predicting]]


def answers_of(step) -> list[RolloutGroup]:
    """Return a step's answers as actors return them."""
    logps = torch.from_numpy(step["logits"] / step["temperature"]).log_softmax(-1).numpy()
    known = np.take_along_axis(logps, step["targets"][..., None], -1)[..., 0]
    groups, size = [], step["group_size"]
    for prompt, rewards in enumerate(step["rewards"]):
        numbers = range(prompt * size, (prompt + 1) * size)
        lengths = [int(step["lengths"][number]) for number in numbers]
        answers = [
            SampledAnswer(
                step["targets"][number][:length].tolist(),
                (known + step["old_gap"])[number][:length].tolist(),
                ended=True,
            )
            for number, length in zip(numbers, lengths, strict=True)
        ]
        reference = [
            (known + step["reference_gap"])[number][:length].tolist()
            for number, length in zip(numbers, lengths, strict=True)
        ]
        asked = AskedQuestion(f"q{prompt}", "?", [prompt], None, [], "yes")
        groups.append(RolloutGroup(asked, answers, [""] * size, rewards[:, None], reference))
    return groups


def make_numbered(groups: list[RolloutGroup], rewards: np.ndarray, grpo: GrpoConfig) -> list[RolloutSample]:
    """Make a step's samples, and give each answer a prompt of its own: its number, by which the model knows it."""
    numbers = {id(answer.token_ids): place for place, answer in enumerate(a for some in groups for a in some.answers)}
    made = make_samples(groups, rewards, grpo)
    return [replace(one, asked=replace(one.asked, prompt=[numbers[id(one.token_ids)]])) for one in made]


@pytest.mark.parametrize("world_size", [1, 2])
def test_losses_gradients_and_metrics_equal_trl_however_answers_are_packed(world_size: int) -> None:
    golden = json.loads(GOLDEN.read_text())
    assert len(golden) == NUM_STEPS
    for number, expected in enumerate(golden):
        step = make_step(number)
        settings = {key: step[key] for key in ("loss_type", "scale_rewards", "group_size", "epsilon", "epsilon_high")}
        grpo = GrpoConfig(**settings, beta=step["beta"], temperature=step["temperature"], max_new_tokens=LONGEST)
        objective = Grpo(step["epsilon"], step["epsilon_high"], step["beta"], step["temperature"])
        model = KnownLogits(step["logits"], torch.float32)
        samples = make_numbered(answers_of(step), step["rewards"], grpo)
        ranks = deal_samples(samples, 20, world_size, SampleCost())
        # What has no gradient is left out of rows, and of the means that are metrics.
        share = sum(len(sample.token_ids) for sample in samples) / step["lengths"].sum()
        assert (share < 1) == (step["beta"] == 0)
        loss, total = StepLoss(objective, CPU), torch.zeros(())
        for rank, dealt in enumerate(ranks):
            for batch in make_batches(dealt, number, rank):
                row = PackedRow.on_device(
                    batch.input_ids, batch.position_ids, batch.labels, CPU, multiple=8, rollouts=move_terms(batch, CPU)
                )
                total = total + loss.add(objective.compute(model, row), batch)
        total.backward()
        assert total.item() == pytest.approx(expected["loss"], abs=1e-5)
        value, metrics = loss.read()
        assert value == pytest.approx(expected["loss"], abs=1e-5)
        for name, mean in expected["metrics"].items():
            assert metrics[name] * share == pytest.approx(mean, abs=1e-5), (number, name)
        # d logits = (one-hot - probabilities) / temperature times d log-probability, which is TRL's.
        probabilities = torch.from_numpy(step["logits"] / step["temperature"]).softmax(-1)
        for answer, gradients in enumerate(expected["gradient"]):
            for place, gradient in enumerate(gradients):
                target = torch.nn.functional.one_hot(torch.tensor(step["targets"][answer, place]), VOCABULARY)
                wanted = gradient * (target - probabilities[answer, place]) / step["temperature"]
                assert torch.allclose(model.logits.grad[answer, place].double(), wanted, atol=1e-5)
        assert not model.logits.grad[0, len(expected["gradient"][0]) :].any()


def test_the_estimate_of_the_divergence_is_zero_for_equal_models_and_else_positive() -> None:
    old = torch.tensor([-1.0, -2.0, -0.5])
    assert compute_token_kl(old, old).tolist() == [0, 0, 0]
    assert (compute_token_kl(old, old + torch.tensor([0.3, -0.3, 1.0])) > 0).all()
    assert compute_token_kl(torch.tensor([0.0]), torch.tensor([np.log(2)])).item() == pytest.approx(2 - np.log(2) - 1)


def test_a_step_without_anything_to_learn_has_a_loss_and_a_gradient_of_zero() -> None:
    step = make_step(0)
    grpo = GrpoConfig(group_size=step["group_size"])
    assert make_samples(answers_of(step), np.ones_like(step["rewards"]), grpo) == [], "equal rewards teach nothing"
    model = KnownLogits(np.zeros((1, 1, VOCABULARY)), torch.float32)
    for rank, dealt in enumerate(deal_samples([], 20, 2, SampleCost(), ["q0", "q1"])):
        [batch] = make_batches(dealt, 0, rank)
        assert find_ledger_ids([batch]) == ([] if rank else ["q0", "q1"])
        row = PackedRow.on_device(
            batch.input_ids, batch.position_ids, batch.labels, CPU, rollouts=move_terms(batch, CPU)
        )
        loss = StepLoss(Grpo(), CPU)
        loss.add(Grpo().compute(model, row), batch).backward()
        assert (loss.read()[0], set(loss.read()[1].values())) == (0.0, {0.0})
        assert not model.logits.grad.any()
