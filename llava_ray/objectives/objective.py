"""The interface of an objective, which training, held-out evaluation and preview compute.

An objective sums losses over terms (supervised tokens, or pairs of answers); the loss of a step is that sum over all
its micro-batches and ranks, divided by the step's number of terms, so it does not depend on how samples are packed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad

from llava_ray.chat.conversation import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava_ray.images.anyres import Size
from llava_ray.model.network.sample_attention import SampleBorders
from llava_ray.model.network.transfer import to_device
from llava_ray.objectives.row_pairs import RowPairs


@dataclass(frozen=True)
class RolloutTerms:
    """What a row of sampled answers carries for each of its supervised tokens, in order."""

    advantages: Float[Tensor, " s"]
    old_log_probs: Float[Tensor, " s"]
    """Under the weights, and at the temperature, with which the token was sampled."""
    weights: Float[Tensor, " s"]
    reference_log_probs: Float[Tensor, " s"] | None = None
    """Under the weights that the run started with."""


@dataclass(frozen=True)
class PackedRow:
    """Samples packed into one row of t tokens, on the model's device; see ``Llava.forward`` for the images.

    What follows from the tokens is None where nobody has computed it ahead (``on_device`` does).
    """

    input_ids: Int[Tensor, "1 t"]
    position_ids: Int[Tensor, "1 t"]
    labels: Int[Tensor, "1 t"]
    features: Float[Tensor, "n p v"] | None = None
    image_sizes: Sequence[Size] = ()
    pixels: Float[Tensor, "n 3 h w"] | None = None
    predicted: tuple[Int[Tensor, " s"], Int[Tensor, " s"]] | None = None
    """The positions that predict a supervised token, and those tokens."""
    borders: SampleBorders | None = None
    image_positions: Int[Tensor, " m"] | None = None
    pairs: RowPairs | None = None
    """None in a row without preferences."""
    rollouts: RolloutTerms | None = None
    """None in a row of records."""

    @classmethod
    def on_device(
        cls,
        input_ids: Int[Tensor, "1 t"],
        position_ids: Int[Tensor, "1 t"],
        labels: Int[Tensor, "1 t"],
        device: torch.device,
        *,
        multiple: int = 1,
        branches: Sequence[tuple[int, int] | None] = (),
        reference: Float[Tensor, "m 2"] | None = None,
        **images: Any,
    ) -> "PackedRow":
        """Move a row to the device, from CPU tensors of its tokens, with all that needs counting.

        Counting on a GPU would make its host wait for all work that it has queued. Unsupervised tokens, a sample of
        their own, fill the row to a ``multiple`` of tokens. ``branches`` say where each sample that is a preference
        branches (see SampleBorders), ``reference`` what the reference makes of them. ``images`` are the fields of
        images.
        """
        num_filler = -input_ids.shape[1] % multiple
        if num_filler:
            input_ids = pad(input_ids, (0, num_filler))
            labels = pad(labels, (0, num_filler), value=IGNORE_INDEX)
            position_ids = torch.cat([position_ids, torch.arange(num_filler)[None]], dim=1)
        supervised = find_supervised(labels, position_ids)
        starts = (position_ids[0] == 0).nonzero().squeeze(1).tolist()
        lengths = [end - start for start, end in pairwise([*starts, position_ids.shape[1]])]
        image_positions = (input_ids[0] == IMAGE_TOKEN_INDEX).nonzero().squeeze(1)
        branches = [*branches, *[None] * (len(lengths) - len(branches))] if any(branches) else ()
        return cls(
            to_device(input_ids, device),
            to_device(position_ids, device),
            to_device(labels, device),
            predicted=(to_device(supervised[0], device), to_device(supervised[1], device)),
            borders=SampleBorders.of(lengths, device, branches),
            image_positions=to_device(image_positions, device),
            pairs=RowPairs.of(supervised[0], lengths, branches, reference, device) if branches else None,
            **images,
        )

    def find_supervised(self) -> tuple[Int[Tensor, " s"], Int[Tensor, " s"]]:
        """Return the positions that predict a supervised token, and those tokens."""
        return self.predicted or find_supervised(self.labels, self.position_ids)

    @property
    def model_inputs(self) -> dict[str, Any]:
        """Return what the model takes beside the tokens, their positions and what is to be predicted."""
        names = ("features", "image_sizes", "pixels", "borders", "image_positions")
        return {name: getattr(self, name) for name in names}


@runtime_checkable
class LogitsModel(Protocol):
    """A ``Llava``, or an engine that wraps it: takes the arguments of ``Llava.forward``, returns logits (s, vocab).

    Asked with ``targets``, it may return the cross-entropy of each (s,) instead, which takes less memory.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the logits, or losses, at the positions that were asked for."""
        ...


@runtime_checkable
class StepTotals(Protocol):
    """The totals of a whole step, over all ranks; every micro-batch carries them."""

    @property
    def num_supervised(self) -> int:
        """Return the number of supervised tokens of conversations."""
        ...

    @property
    def num_pairs(self) -> int:
        """Return the number of preferences."""
        ...

    @property
    def num_chosen(self) -> int:
        """Return the number of supervised tokens of chosen answers."""
        ...


@dataclass(frozen=True)
class ObjectiveOutput:
    """The losses of a row's terms, and where in the row each term stands."""

    losses: Float[Tensor, " n"]
    positions: Int[Tensor, " n"]
    metrics: Mapping[str, Float[Tensor, ""]] = field(default_factory=dict)
    """Sums over the terms of the first kind; means of them are logged beside the loss."""
    kinds: Int[Tensor, " n"] | None = None
    """The kind of each term, from 0; None where all are of one. Each kind has a mean of its own in a step's loss."""

    @property
    def loss_sum(self) -> Float[Tensor, ""]:
        """Return the sum of all losses. It can always be differentiated, also without any term."""
        return self.losses.sum()

    @property
    def num_terms(self) -> int:
        """Return the number of terms."""
        return len(self.losses)

    def sums(self, num_kinds: int) -> Float[Tensor, " k"]:
        """Return the sum of the losses of each kind."""
        if self.kinds is None:
            return self.loss_sum.expand(1)
        return self.losses.new_zeros(num_kinds).index_add(0, self.kinds, self.losses)

    def counts(self, num_kinds: int) -> list[int]:
        """Return the number of terms of each kind."""
        return [self.num_terms] if self.kinds is None else torch.bincount(self.kinds, minlength=num_kinds).tolist()


@runtime_checkable
class Objective(Protocol):
    """A loss to train with. A new one is a file beside this one and an entry in ``build_objective``."""

    @property
    def num_kinds(self) -> int:
        """Return the number of kinds of terms."""
        ...

    @property
    def metric_names(self) -> Sequence[str]:
        """Return the keys of ``ObjectiveOutput.metrics``: every rank reduces the same ones, whatever its rows hold."""
        ...

    def compute(self, model: LogitsModel, row: PackedRow) -> ObjectiveOutput:
        """Run the model on a row and return the losses of its terms.

        The model must be called once, with images or without: ranks would otherwise wait for each other forever.
        """
        ...

    def num_step_terms(self, totals: StepTotals) -> Sequence[int]:
        """Return the number of terms of each kind in the whole step, over all ranks.

        The sum of a kind's losses is divided by it, and metrics by the first.
        """
        ...


def find_supervised(
    labels: Int[Tensor, "1 t"], position_ids: Int[Tensor, "1 t"]
) -> tuple[Int[Tensor, " s"], Int[Tensor, " s"]]:
    """Return the positions that predict a supervised token, and those tokens.

    Labels are shifted here: position i predicts ``labels[i + 1]``. A sample's first token (position 0) is never
    predicted: the token before it belongs to another sample.
    """
    following = labels[0, 1:].masked_fill(position_ids[0, 1:] == 0, IGNORE_INDEX)
    predicting = (following != IGNORE_INDEX).nonzero().squeeze(1)
    return predicting, following[predicting]


def mean_by_sample(
    output: ObjectiveOutput, position_ids: Int[Tensor, "1 t"]
) -> tuple[Float[Tensor, " m"], Int[Tensor, " m"]]:
    """Return the mean loss of each packed sample over its terms, and their number.

    A sample without terms has loss NaN and number 0.
    """
    sample_of_position = (position_ids[0] == 0).cumsum(0) - 1
    owner = sample_of_position[output.positions]
    num_samples = int(sample_of_position[-1]) + 1
    counts = torch.bincount(owner, minlength=num_samples)
    sums = output.losses.new_zeros(num_samples).index_add(0, owner, output.losses)
    return sums / counts, counts
