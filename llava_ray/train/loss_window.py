"""Steps whose losses the host has not looked at yet: a GPU goes on computing until it does, every so many steps."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from llava_ray.config.train import TrainConfig
from llava_ray.data.batches import MicroBatch
from llava_ray.train.nonfinite import StepEnd
from llava_ray.train.objective import StepLoss
from llava_ray.train.speed import StepNotes

_STEPS_ON_GPU = 10


@dataclass(frozen=True)
class EndedStep:
    """A step whose optimiser has been asked to step, perhaps ahead of the device."""

    step: int
    batches: list[MicroBatch]
    losses: StepLoss
    """Over all ranks."""
    end: StepEnd
    notes: StepNotes


class LossWindow:
    """The steps since the last look at their losses, in order; as many on every rank."""

    def __init__(self, train: TrainConfig, device: torch.device) -> None:
        """Look at every step on a CPU, which computes nothing ahead, and where steps may be left out for their loss."""
        asked = train.fetch_loss_steps
        default = _STEPS_ON_GPU if device.type == "cuda" else 1
        self.size = 1 if train.on_nonfinite == "skip" else default if asked == "auto" else asked
        self.steps: list[EndedStep] = []

    @property
    def is_full(self) -> bool:
        """Return whether the losses are to be looked at after the step under way."""
        return len(self.steps) + 1 >= self.size

    def add(self, ended: EndedStep) -> None:
        """Add the step that has just ended."""
        self.steps.append(ended)

    def fetch(self) -> Iterator[tuple[EndedStep, float, dict[str, float]]]:
        """Yield each step with its loss and its metrics, of objective and sources, and empty the window; waits once."""
        steps, self.steps = self.steps, []
        values = torch.stack([one.losses.values for one in steps]).tolist()
        for ended, (loss, *metrics) in zip(steps, values, strict=True):
            yield ended, loss, ended.losses.name_values(loss, metrics)
