"""Cross-entropy of a packed row, token by token and sample by sample, as the tests of models ask for it."""

from typing import Any

from torch import Tensor

from llava_ray.objectives.cross_entropy import CrossEntropy
from llava_ray.objectives.objective import ObjectiveOutput, PackedRow, mean_by_sample


def cross_entropy_of(llava: Any, *row: Any, **named: Any) -> ObjectiveOutput:
    """Takes the fields of a PackedRow."""
    return CrossEntropy().compute(llava, PackedRow(*row, **named))


def token_losses(llava: Any, *row: Any, **named: Any) -> Tensor:
    return cross_entropy_of(llava, *row, **named).losses


def sample_losses(llava: Any, *row: Any, **named: Any) -> tuple[Tensor, Tensor]:
    packed = PackedRow(*row, **named)
    return mean_by_sample(cross_entropy_of(llava, *row, **named), packed.position_ids)
