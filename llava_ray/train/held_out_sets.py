"""The held-out samples of a run and of the sources of its mixture, evaluated one set after the other."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from llava_ray.model.assembly import LlavaParts
from llava_ray.objectives.objective import Objective
from llava_ray.train.held_out import HeldOutEvaluator
from llava_ray.train.settings import HeldOut

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


class HeldOutSets:
    """One rank's part of all held-out samples."""

    def __init__(
        self, held_out: Sequence[HeldOut], parts: LlavaParts, objective: Objective, rank: int, world_size: int
    ) -> None:
        """Read the samples of each set; without any ``evaluate`` returns nothing."""
        self.sets = [(one.name, HeldOutEvaluator(one, parts, objective, rank, world_size)) for one in held_out]

    def evaluate(self, engine: "DeepSpeedEngine", device: torch.device) -> dict[str, float]:
        """Return the metrics of the run's own set, and of each source's as ``held_out_loss/NAME``; collective.

        Where the run has no set of its own, its metrics are of the sources' samples together.
        """
        metrics: dict[str, float] = {}
        sums: list[list[float]] = []
        for name, evaluator in self.sets:
            found = evaluator.sum_up(engine, device)
            named = evaluator.name_sums(found)
            if name is None:
                metrics |= named
            else:
                metrics |= {f"{key}/{name}": value for key, value in named.items()}
                sums.append(found)
        if sums and "held_out_loss" not in metrics:
            together = [sum(column) for column in zip(*sums, strict=True)]
            metrics = self.sets[0][1].name_sums(together) | metrics
        return metrics
