"""A step's sampled answers as packed rows: made by the coordinator, turned into micro-batches by the ranks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from types import MappingProxyType

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from llava_ray.chat.conversation import IGNORE_INDEX
from llava_ray.config.grpo import GrpoConfig
from llava_ray.data.batches import MicroBatch
from llava_ray.data.row_assignment import SampleCost, assign_to_ranks
from llava_ray.images.anyres import Size
from llava_ray.model.network.transfer import to_device
from llava_ray.objectives.objective import RolloutTerms
from llava_ray.train.rollouts.advantages import compute_advantages, weigh_answers
from llava_ray.train.rollouts.answered import AskedQuestion, RolloutGroup


@dataclass(frozen=True)
class RolloutSample:
    """One question with one of its answers, and what the objective needs of it."""

    asked: AskedQuestion
    token_ids: list[int]
    old_log_probs: list[float]
    advantage: float
    weight: float
    reference_log_probs: list[float] | None

    @property
    def num_tokens(self) -> int:
        """Return the length of question and answer."""
        return len(self.asked.prompt) + len(self.token_ids)


@dataclass(frozen=True)
class RankRows:
    """What a rank computes in a step: the samples of each row, and the whole step's totals and metrics."""

    rows: list[list[RolloutSample]]
    num_supervised: int
    ids: list[str]
    """Of the step's questions, on one rank; none on others."""
    metrics: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class RolloutBatch(MicroBatch):
    """A packed row of sampled answers. Its ``ids`` are the records'."""

    terms: RolloutTerms
    ledger_ids: list[str]
    """The ids of the step's questions, in one batch of one rank."""
    step_metrics: Mapping[str, float]
    """Of the whole step, on every rank."""


def make_samples(
    groups: Sequence[RolloutGroup], rewards: Float[np.ndarray, "n g"], grpo: GrpoConfig
) -> list[RolloutSample]:
    """Return the answers of a step that teach something, with advantages and weights, in the order of its questions.

    Without a divergence from a reference, answers whose advantage is 0 have no gradient and are left out. They still
    count in the mean: the others' weights are for a sum that is divided by the number of the others' tokens.
    """
    answers = [answer for group in groups for answer in group.answers]
    lengths = np.asarray([len(answer.token_ids) for answer in answers])
    advantages = compute_advantages(rewards, grpo.scale_rewards).flatten()
    teaches = (advantages != 0) | (grpo.beta > 0)
    weights = weigh_answers(lengths, grpo) * (lengths[teaches].sum() / lengths.sum())
    samples = []
    for place in np.flatnonzero(teaches).tolist():
        group, number = groups[place // grpo.group_size], place % grpo.group_size
        answer, reference = answers[place], group.reference[number] if group.reference else None
        numbers = float(advantages[place]), float(weights[place])
        samples.append(RolloutSample(group.asked, answer.token_ids, answer.log_probs, *numbers, reference))
    return samples


def deal_samples(
    samples: Sequence[RolloutSample],
    row_length: int,
    world_size: int,
    cost: SampleCost,
    ids: Sequence[str] = (),
    metrics: Mapping[str, float] = MappingProxyType({}),
) -> list[RankRows]:
    """Pack a step's samples into rows, and deal these to ranks, as the plan's examples are.

    ``ids`` are those of all its questions. A step without samples has rows without any, and one token to divide by.
    """
    lengths = [sample.num_tokens for sample in samples]
    num_images = np.asarray([len(sample.asked.sizes) for sample in samples])
    costs = cost.estimate(np.asarray(lengths), num_images).tolist()
    dealt = assign_to_ranks(lengths, row_length, world_size, costs)
    total = max(1, sum(len(sample.token_ids) for sample in samples))
    return [
        RankRows([[samples[place] for place in row] for row in rows] or [[]], total, [] if rank else list(ids), metrics)
        for rank, rows in enumerate(dealt)
    ]


def make_batches(dealt: RankRows, step: int, rank: int) -> list[RolloutBatch]:
    """Return a rank's rows of a step as micro-batches on the CPU."""
    return [_make_batch(row, dealt, step, rank, [] if place else dealt.ids) for place, row in enumerate(dealt.rows)]


def _make_batch(
    row: Sequence[RolloutSample], dealt: RankRows, step: int, rank: int, ledger_ids: list[str]
) -> RolloutBatch:
    lengths = [sample.num_tokens for sample in row]
    ids = list(chain.from_iterable((*sample.asked.prompt, *sample.token_ids) for sample in row))
    labels = list(
        chain.from_iterable((*[IGNORE_INDEX] * len(sample.asked.prompt), *sample.token_ids) for sample in row)
    )
    views = [sample.asked.images for sample in row if sample.asked.images is not None]
    shown = torch.cat(views) if views else None
    is_pixels = shown is not None and shown.dtype == torch.uint8
    sizes: list[Size] = [size for sample in row for size in sample.asked.sizes]
    return RolloutBatch(
        step=step,
        rank=rank,
        num_supervised=dealt.num_supervised,
        num_micro_batches=len(dealt.rows),
        ids=[sample.asked.id for sample in row],
        num_tokens=lengths,
        # A rank that has nothing to do takes part with one token and no weight (see ``data.packing.unpack_tokens``).
        input_ids=_as_row(ids or [0]),
        position_ids=_as_row([place for length in lengths or [1] for place in range(length)]),
        labels=_as_row(labels or [IGNORE_INDEX]),
        image_sizes=sizes,
        pixels=shown if is_pixels else None,
        features=None if is_pixels else shown,
        terms=_make_terms(row),
        ledger_ids=ledger_ids,
        step_metrics=dealt.metrics,
    )


def _as_row(values: Sequence[int]) -> Int64[Tensor, "1 t"]:
    return torch.tensor(values, dtype=torch.int64)[None]


def _make_terms(row: Sequence[RolloutSample]) -> RolloutTerms:
    """Return the objective's numbers of each answer token of a row."""

    def repeated(values: Sequence[float]) -> Tensor:
        counts = torch.tensor([len(sample.token_ids) for sample in row], dtype=torch.int64)
        return torch.tensor(values, dtype=torch.float32).repeat_interleave(counts)

    old = [number for sample in row for number in sample.old_log_probs]
    reference = [sample.reference_log_probs for sample in row]
    known = [one for one in reference if one is not None]
    return RolloutTerms(
        repeated([sample.advantage for sample in row]),
        torch.tensor(old, dtype=torch.float32),
        repeated([sample.weight for sample in row]),
        torch.tensor(list(chain.from_iterable(known)), dtype=torch.float32) if len(known) == len(row) else None,
    )


def move_terms(batch: MicroBatch, device: torch.device) -> RolloutTerms | None:
    """Return a batch's numbers for the objective on a device; None for one of records."""
    if not isinstance(batch, RolloutBatch):
        return None
    terms = batch.terms
    reference = terms.reference_log_probs
    return RolloutTerms(
        to_device(terms.advantages, device),
        to_device(terms.old_log_probs, device),
        to_device(terms.weights, device),
        None if reference is None else to_device(reference, device),
    )


def find_ledger_ids(batches: Sequence[MicroBatch]) -> list[str]:
    """Return the ids that the ledger names: the samples', or those of the questions that were asked."""
    return [name for batch in batches for name in (batch.ledger_ids if isinstance(batch, RolloutBatch) else batch.ids)]


def find_step_metrics(batches: Sequence[MicroBatch]) -> dict[str, float]:
    """Return the metrics that batches of sampled answers carry; none for those of records."""
    return dict(batches[0].step_metrics) if isinstance(batches[0], RolloutBatch) else {}
