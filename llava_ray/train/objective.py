"""A run's objective: what a train worker gives it of a micro-batch, and how a step's losses become one number."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor

from llava_ray.data.batches import MicroBatch
from llava_ray.data.settings import StreamSettings
from llava_ray.images.processing import normalize_pixels
from llava_ray.model.assembly import LlavaParts
from llava_ray.model.network.transfer import to_device
from llava_ray.objectives.objective import Objective, ObjectiveOutput, PackedRow

# In bf16 oneDNN compiles its matrix kernels for each length of a row: a tenth of the time of a row whose length is
# new. Rows of a multiple of this many tokens find most of them compiled, for 2 % more tokens.
_REPEATED_LENGTH = 64


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
    features = pixels = None
    if batch.pixels is not None and not stream.model.unfreeze_mm_vision_tower:
        with phase("forward"):
            features = parts.tower.extract(batch.pixels, lambda views: normalize_pixels(views, stream.image_spec))
    with phase("copy"):
        if batch.features is not None:
            features = to_device(batch.features, device)
        elif batch.pixels is not None and stream.model.unfreeze_mm_vision_tower:
            pixels = normalize_pixels(to_device(batch.pixels, device), stream.image_spec)
        return PackedRow.on_device(
            batch.input_ids,
            batch.position_ids,
            batch.labels,
            device,
            multiple=_REPEATED_LENGTH if stream.bf16 and device.type == "cpu" else 1,
            features=features,
            image_sizes=batch.image_sizes,
            pixels=pixels,
        )


class StepLoss:
    """The loss and the objective's metrics of one step, summed over its micro-batches and then over ranks."""

    def __init__(self, objective: Objective, device: torch.device) -> None:
        """Start from zero."""
        self.objective = objective
        self.loss = torch.zeros((), device=device)
        self.metrics = torch.zeros(len(objective.metric_names), device=device)

    def add(self, output: ObjectiveOutput, batch: MicroBatch) -> Tensor:
        """Add a micro-batch's share and return its part of the step's loss, to be differentiated."""
        num_terms = self.objective.num_step_terms(batch)
        micro_loss = output.loss_sum / num_terms
        self.loss += micro_loss.detach()
        for index, name in enumerate(self.objective.metric_names):
            self.metrics[index] += output.metrics[name].detach() / num_terms
        return micro_loss

    def reduce(self) -> tuple[float, dict[str, float]]:
        """Return the step's loss and metrics over all ranks; collective."""
        dist.all_reduce(self.loss)
        if len(self.metrics):  # on every rank or on none
            dist.all_reduce(self.metrics)
        return self.loss.item(), dict(zip(self.objective.metric_names, self.metrics.tolist(), strict=True))
