"""Objectives over pairs: against their published formulae, against TRL, and packed against one by one."""

import json
import math
from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import preference_vectors
import pytest
import torch
from torch import Tensor, nn

from llava_ray.chat.conversation import IGNORE_INDEX
from llava_ray.config.preference import PAIR_OBJECTIVES, WITH_REFERENCE, PreferenceConfig
from llava_ray.data.pair_lengths import PairLengths
from llava_ray.errors import ModelError
from llava_ray.model.network.llava import Llava
from llava_ray.objectives.objective import ObjectiveOutput, PackedRow
from llava_ray.objectives.preference import PAIR_LOSSES, PairObjective, PairScores
from llava_ray.train.objective import StepLoss

CPU = torch.device("cpu")
TRL = json.loads(preference_vectors.GOLDEN.read_text())


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


def published_loss(name: str, policy: Sequence[float], reference: Sequence[float], lengths: Sequence[int], s) -> float:
    """The loss of one pair as its paper writes it, in double precision."""
    (chosen, rejected), (ref_chosen, ref_rejected), (long, short) = policy, reference, lengths
    margin = (chosen - ref_chosen) - (rejected - ref_rejected)
    mean_margin = (chosen - ref_chosen) / long - (rejected - ref_rejected) / short
    share = s.label_smoothing

    def smoothed(logit: float) -> float:
        return -(1 - share) * math.log(sigmoid(logit)) - share * math.log(sigmoid(-logit))

    def odds(mean: float) -> float:
        return math.exp(mean) / (1 - math.exp(mean))

    if name == "dpo":
        return smoothed(s.beta * margin)
    if name == "dpo_norm":
        return smoothed(s.beta * mean_margin)
    if name == "ipo":
        return (mean_margin - 1 / (2 * s.beta)) ** 2
    if name == "hinge":
        return max(0.0, 1 - s.beta * margin)
    if name == "robust":
        kept, flipped = math.log(sigmoid(s.beta * margin)), math.log(sigmoid(-s.beta * margin))
        return (-(1 - share) * kept + share * flipped) / (1 - 2 * share)
    if name == "simpo":
        return smoothed(s.beta * chosen / long - s.beta * rejected / short - s.simpo_gamma)
    assert name == "orpo"
    return -s.beta * math.log(sigmoid(math.log(odds(chosen / long) / odds(rejected / short))))


@pytest.mark.parametrize("name", sorted(PAIR_OBJECTIVES))
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_losses_are_those_of_the_published_formulae(name: str, smoothing: float) -> None:
    draw = np.random.default_rng(3)
    policy, reference = -draw.uniform(0.01, 30, (200, 2)), -draw.uniform(0.01, 30, (200, 2))
    lengths = draw.integers(1, 40, (200, 2))
    settings = PreferenceConfig(beta=0.3, label_smoothing=smoothing, simpo_gamma=0.7)
    without = name not in WITH_REFERENCE
    scores = PairScores(
        torch.tensor(policy, dtype=torch.float32),
        torch.tensor(lengths, dtype=torch.float32),
        torch.zeros(200, 2) if without else torch.tensor(reference, dtype=torch.float32),
    )
    expected = [
        published_loss(name, *rows, settings)
        for rows in zip(policy.tolist(), reference.tolist(), lengths.tolist(), strict=True)
    ]
    torch.testing.assert_close(
        PAIR_LOSSES[name](scores, settings).double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-5
    )


def make_llava(language_model: nn.Module) -> Llava:
    """A LLaVA around a language model, for rows without images."""
    llava = Llava(nn.Linear(4, language_model.config.hidden_size), language_model, 4)
    llava.attend_by_sample()
    return llava


def make_row(
    samples: Sequence[tuple[list[int], list[int], list[int]]], reference: Tensor | None, **others: object
) -> PackedRow:
    """Pack samples: (prompt, chosen, rejected) is a preference, (prompt, answer, []) a conversation."""
    ids, labels, positions, branches = [], [], [], []
    for prompt, chosen, rejected in samples:
        shared = len(prompt) - 1
        ids += prompt + chosen + (prompt[-1:] + rejected if rejected else [])
        labels += [IGNORE_INDEX] * len(prompt) + chosen + ([IGNORE_INDEX, *rejected] if rejected else [])
        if rejected:
            lengths = PairLengths(shared, 1 + len(chosen), 1 + len(rejected))
            positions += lengths.position_ids.tolist()
            branches.append((shared, shared + lengths.chosen))
        else:
            positions += range(len(prompt) + len(chosen))
            branches.append(None)
    row = (torch.tensor(values)[None] for values in (ids, positions, labels))
    return PackedRow.on_device(*row, CPU, branches=branches, reference=reference, **others)


class Totals:
    """The totals of a step of one row."""

    def __init__(self, samples: Sequence[tuple[list[int], list[int], list[int]]]) -> None:
        self.num_pairs = sum(bool(rejected) for _, _, rejected in samples)
        self.num_supervised = sum(len(answer) for _, answer, rejected in samples if not rejected)
        self.num_chosen = sum(len(answer) for _, answer, rejected in samples if rejected)


def step_loss(objective: PairObjective, output: ObjectiveOutput, totals: Totals) -> tuple[Tensor, dict[str, float]]:
    """The loss and the metrics of a step of one row."""
    step = StepLoss(objective, CPU)
    loss = step.add(output, totals)
    return loss, step.read()[1]


@pytest.mark.slow
@pytest.mark.parametrize("variant", preference_vectors.VARIANTS)
def test_losses_gradients_and_metrics_are_those_of_trl(variant: str) -> None:
    """Fifty batches of three pairs; ours share the prompt's tokens, TRL's repeat it."""
    name, _, settings = preference_vectors.VARIANTS[variant]
    objective = PairObjective(name, PreferenceConfig(**settings))
    llava = make_llava(preference_vectors.make_model())
    for number, batch in enumerate(preference_vectors.make_batches()):
        llava.zero_grad()
        reference = preference_vectors.make_reference(number) if objective.needs_reference else None
        output = objective.compute(llava, make_row(batch, reference))
        loss, metrics = step_loss(objective, output, Totals(batch))
        loss.backward()
        expected, norm, *others = TRL["losses"][variant][number]
        assert loss.item() == pytest.approx(expected, rel=1e-5, abs=1e-5)
        own_norm, *projections = preference_vectors.project_gradients(llava.language_model)
        assert own_norm == pytest.approx(norm, rel=1e-5)
        assert projections == pytest.approx(others[: len(projections)], abs=1e-5 * norm)
        theirs = dict(zip(objective.metric_names, others[len(projections) :], strict=False))
        if theirs and name == "dpo":  # ours of averages over tokens are averages
            assert {key: metrics[key] for key in theirs} == pytest.approx(theirs, rel=1e-4, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(PAIR_OBJECTIVES))
def test_a_packed_row_is_its_samples_one_by_one(name: str) -> None:
    """Pairs beside conversations, in one row or in rows of their own, add up to the same step."""
    objective = PairObjective(name, PreferenceConfig(beta=0.4, rpo_alpha=0.0 if name == "orpo" else 0.3))
    llava = make_llava(preference_vectors.make_model())
    [first, second, *_] = preference_vectors.make_batches()
    samples = [first[0], (*second[0][:2], []), first[1], (*second[1][:2], []), first[2]]
    reference = -10 * torch.rand(3, 2, generator=torch.Generator().manual_seed(5)).double()
    totals, found = Totals(samples), []
    for rows in ([samples], [[sample] for sample in samples], [samples[:2], samples[2:]]):
        llava.zero_grad()
        step, taken = StepLoss(objective, CPU), 0
        for row in rows:
            pairs = sum(bool(rejected) for _, _, rejected in row)
            of_row = reference[taken : taken + pairs] if pairs else None
            step.add(objective.compute(llava, make_row(row, of_row)), totals).backward()
            taken += pairs
        found.append((*step.read(), preference_vectors.project_gradients(llava.language_model)))
    for loss, metrics, gradients in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-5)
        assert metrics == pytest.approx(found[0][1], rel=1e-4, abs=1e-5)
        assert gradients == pytest.approx(found[0][2], rel=1e-4, abs=1e-5)


def test_a_row_without_pairs_has_the_same_metrics_and_can_be_differentiated() -> None:
    objective = PairObjective("dpo", PreferenceConfig())
    llava = make_llava(preference_vectors.make_model())
    output = objective.compute(llava, make_row([([1, 2], [3, 4], [])], None))
    assert output.counts(3) == [0, 2, 0]
    assert set(output.metrics) == set(objective.metric_names)
    output.loss_sum.backward()


def test_pairs_without_a_reference_are_refused() -> None:
    llava = make_llava(preference_vectors.make_model())
    with pytest.raises(ModelError, match="needs the reference's log-probabilities"):
        PairObjective("dpo", PreferenceConfig()).compute(llava, make_row([([1, 2], [3], [4])], None))


def test_tokens_belong_to_the_answers_that_they_are_of() -> None:
    row = make_row([([1, 2, 3], [4, 5], [6]), ([1, 2], [7], []), ([8, 9], [1], [2, 3, 4])], None)
    assert row.pairs is not None
    assert row.pairs.owners.tolist() == [0, 0, 1, -1, 2, 3, 3, 3]
    assert row.pairs.num_tokens.tolist() == [[2, 1], [1, 3]]
    assert row.pairs.positions.tolist() == [0, 10]
    starts = [0, *accumulate(row.borders.lengths)]
    assert starts == [0, 7, 10, 17]
