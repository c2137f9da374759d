"""A run's objective: what a train worker gives it of a micro-batch, and how a step's losses become one number."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.distributed as dist
from jaxtyping import UInt8
from torch import Tensor

from llava_ray.data.batches import MicroBatch
from llava_ray.data.settings import StreamSettings
from llava_ray.images.processing import normalize_pixels
from llava_ray.model.assembly import LlavaParts
from llava_ray.model.network.transfer import to_device
from llava_ray.objectives.objective import Objective, ObjectiveOutput, PackedRow
from llava_ray.train.rollouts.rows import move_terms
from llava_ray.train.source_losses import SourceLosses

# In bf16 oneDNN compiles its matrix kernels for each length of a row: a tenth of the time of a row whose length is
# new. Rows of a multiple of this many tokens find most of them compiled, for 2 % more tokens.
_REPEATED_LENGTH = 64


@dataclass(frozen=True)
class CopiedRow:
    """A micro-batch on the device, before its images have been made what the model takes."""

    row: PackedRow
    pixels: UInt8[Tensor, "n 3 h w"] | None

    def tensors(self) -> Iterator[Tensor]:
        """Yield what was copied."""
        row, pairs, rollouts = self.row, self.row.pairs, self.row.rollouts
        copied = [row.input_ids, row.position_ids, row.labels, row.features, row.image_positions, self.pixels]
        copied += [*(row.predicted or ()), None if row.borders is None else row.borders.ends]
        copied += [] if pairs is None else [pairs.owners, pairs.num_tokens, pairs.positions, pairs.reference]
        copied += [] if rollouts is None else vars(rollouts).values()
        yield from (tensor for tensor in copied if tensor is not None)


def copy_row(batch: MicroBatch, stream: StreamSettings, device: torch.device) -> CopiedRow:
    """Copy a micro-batch to the device; a GPU's host does not wait for it."""
    pixels = batch.pixels
    multiple = _REPEATED_LENGTH if stream.bf16 and device.type == "cpu" else 1
    row = move_row(batch, device, batch.features, multiple=multiple)
    return CopiedRow(row, None if pixels is None else to_device(pixels, device))


def move_row(batch: MicroBatch, device: torch.device, features: Tensor | None, *, multiple: int = 1) -> PackedRow:
    """Return a micro-batch's row on the device, with the features of its images."""
    return PackedRow.on_device(
        batch.input_ids,
        batch.position_ids,
        batch.labels,
        device,
        multiple=multiple,
        branches=[None if pair is None else (pair.shared, pair.shared + pair.chosen) for pair in batch.pairs],
        reference=batch.reference,
        features=None if features is None else to_device(features, device),
        image_sizes=batch.image_sizes,
        rollouts=move_terms(batch, device),
    )


def finish_row(copied: CopiedRow, parts: LlavaParts, stream: StreamSettings) -> PackedRow:
    """Return the row with the frozen tower's features, or with normalised pixels where the tower is trained."""
    if copied.pixels is None:
        return copied.row
    if stream.model.unfreeze_mm_vision_tower:
        return replace(copied.row, pixels=normalize_pixels(copied.pixels, stream.image_spec))
    features = parts.tower.extract(copied.pixels, lambda views: normalize_pixels(views, stream.image_spec))
    return replace(copied.row, features=features)


def build_row(
    batch: MicroBatch,
    parts: LlavaParts,
    stream: StreamSettings,
    device: torch.device,
    phase: Callable[[str], AbstractContextManager[None]] = lambda name: nullcontext(),
) -> PackedRow:
    """Return a micro-batch on the device, with streamed features, the frozen tower's computed here, or pixels.

    ``phase`` measures a block under a name: "copy", or "forward" for the tower.
    """
    with phase("copy"):
        copied = copy_row(batch, stream, device)
    with phase("forward"):
        return finish_row(copied, parts, stream)


class RowsAhead:
    """Build the rows of a step. A GPU gets those of the next micro-batch while it computes with the one before."""

    def __init__(
        self,
        parts: LlavaParts,
        stream: StreamSettings,
        device: torch.device,
        phase: Callable[[str], AbstractContextManager[None]],
    ) -> None:
        """Copy in a CUDA stream of its own, where the device is a GPU."""
        self.parts, self.stream, self.device, self.phase = parts, stream, device, phase
        self.side = torch.cuda.Stream(device) if device.type == "cuda" else None

    def of(self, batches: Sequence[MicroBatch]) -> Iterator[tuple[MicroBatch, Callable[[], PackedRow]]]:
        """Yield each micro-batch of a step, and what builds its row."""
        if self.side is None:
            for batch in batches:
                yield batch, partial(build_row, batch, self.parts, self.stream, self.device, self.phase)
            return
        ahead = None
        for batch in batches:
            now, ahead = ahead, (batch, *self._start(batch))
            if now is not None:
                yield now[0], partial(self._finish, *now[1:])
        if ahead is not None:
            yield ahead[0], partial(self._finish, *ahead[1:])

    def _start(self, batch: MicroBatch) -> tuple[CopiedRow, torch.cuda.Event]:
        """Start copying a micro-batch beside what the GPU computes; return it with the event of its arrival."""
        assert self.side is not None
        with torch.cuda.stream(self.side), self.phase("copy"):
            copied = copy_row(batch, self.stream, self.device)
            return copied, self.side.record_event()

    def _finish(self, copied: CopiedRow, arrived: torch.cuda.Event) -> PackedRow:
        """Let the GPU wait for a row's copy, not the host, and go on with it."""
        current = torch.cuda.current_stream(self.device)
        current.wait_event(arrived)
        for tensor in copied.tensors():  # their memory was the side stream's: it must not be given away too early
            tensor.record_stream(current)
        with self.phase("forward"):
            return finish_row(copied, self.parts, self.stream)


class StepLoss:
    """The loss and the objective's metrics of one step, summed over its micro-batches and then over ranks."""

    def __init__(self, objective: Objective, device: torch.device, sources: Sequence[str] = ()) -> None:
        """Start from zero; ``sources`` are the names of a mixture's sources."""
        self.objective = objective
        self.sources = SourceLosses(sources, device)
        self.loss = torch.zeros((), device=device)
        self.metrics = torch.zeros(len(objective.metric_names), device=device)

    def add(self, output: ObjectiveOutput, batch: MicroBatch) -> Tensor:
        """Add a micro-batch's share and return its part of the step's loss, to be differentiated."""
        num_terms = [max(1, number) for number in self.objective.num_step_terms(batch)]
        if output.kinds is None:
            micro_loss = output.loss_sum / num_terms[0]
            self.sources.add(output, num_terms[0], batch)
        else:
            divisors = torch.tensor(num_terms, device=output.losses.device)
            micro_loss = (output.sums(len(num_terms)) / divisors).sum()
            self.sources.add(output, divisors[output.kinds], batch)
        self.loss += micro_loss.detach()
        for index, name in enumerate(self.objective.metric_names):
            self.metrics[index] += output.metrics[name].detach() / num_terms[0]
        return micro_loss

    def reduce(self) -> None:
        """Sum loss and metrics over all ranks; collective, and no GPU is waited for."""
        dist.all_reduce(self.loss)
        if len(self.metrics):  # on every rank or on none
            dist.all_reduce(self.metrics)
        self.sources.reduce()

    def read(self) -> tuple[float, dict[str, float]]:
        """Return loss and metrics, once they are reduced; waits for the device."""
        return self.loss.item(), dict(zip(self.objective.metric_names, self.metrics.tolist(), strict=True))

    @property
    def values(self) -> Tensor:
        """Return the loss and all metrics in a row, for one look at several steps."""
        values = torch.cat([self.loss[None], self.metrics])
        return torch.cat([values, self.sources.values]) if self.sources.names else values

    def name_values(self, loss: float, values: Sequence[float]) -> dict[str, float]:
        """Return the metrics by name from the ``values`` behind the loss."""
        names = self.objective.metric_names
        own = dict(zip(names, values[: len(names)], strict=True))
        return own | self.sources.name_values(loss, values[len(names) :])
