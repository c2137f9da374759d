"""Floating-point operations that a training step needs, and the rate at which the processor multiplies matrices."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from llava_ray.data.batches import MicroBatch
from llava_ray.model.assembly import LlavaParts
from llava_ray.objectives.objective import find_supervised

_ROW = 1600  # tokens: about two rows hold a batch of eight


@dataclass(frozen=True)
class ModelFlops:
    """The shapes of a model whose language model and projector are trained and whose tower is frozen."""

    layers: int
    """Parameters of the Linear layers of all blocks of the language model."""
    head: int
    width: int
    num_blocks: int
    projector: int
    first_projection: int
    """Parameters of the projector's first layer, whose input needs no gradient."""
    tower_image: float
    """Operations of the tower for one image."""
    tokens_per_image: int

    @classmethod
    def of(cls, parts: LlavaParts) -> "ModelFlops":
        """Read the shapes of a model."""
        model = parts.llava.language_model
        projections = [m.weight.numel() for m in parts.llava.projector.modules() if isinstance(m, nn.Linear)]
        tower = [m.weight.numel() for m in parts.tower.backbone.modules() if isinstance(m, nn.Linear)]
        config = parts.tower_config
        patches = (config.image_size // config.patch_size) ** 2
        depth = max(parts.tower.depths)
        attention = 4 * (patches + 1) ** 2 * config.hidden_size * depth
        embedding = 2 * patches * 3 * config.patch_size**2 * config.hidden_size
        return cls(
            layers=sum(m.weight.numel() for m in model.base_model.modules() if isinstance(m, nn.Linear)),
            head=model.get_output_embeddings().weight.numel(),
            width=model.config.num_attention_heads * model.config.hidden_size // model.config.num_attention_heads,
            num_blocks=model.config.num_hidden_layers,
            projector=sum(projections),
            first_projection=projections[0],
            tower_image=2 * (patches + 1) * sum(tower) + attention + embedding,
            tokens_per_image=parts.image_tokens.num_features,
        )

    def count(self, batches: Sequence[MicroBatch], *, inline: bool) -> float:
        """Return the useful operations of a step: causal attention per sample, the head where it is supervised.

        A trained matrix takes 2 operations a parameter and token forward and 4 backward, the first behind the frozen
        tower 2 backward.
        """
        total = 0.0
        for batch in batches:
            num_images = len(batch.image_sizes)
            total += 6 * self.layers * sum(batch.num_tokens)
            total += 6 * self.head * len(find_supervised(batch.labels, batch.position_ids)[0])
            total += 3 * self.num_blocks * sum(2 * t * (t + 1) * self.width for t in batch.num_tokens)
            total += (6 * self.projector - 2 * self.first_projection) * num_images * self.tokens_per_image
            total += self.tower_image * num_images if inline else 0.0
        return total


def measure_matrix_rate(dtype: torch.dtype, num_rounds: int = 9) -> float:
    """Return the operations per second of the multiplications of a block, forward and backward; a median."""
    shapes = [(512, 512)] * 4 + [(512, 1376)] * 2 + [(1376, 512)]
    tensors = [
        (torch.randn(_ROW, rows).to(dtype), torch.randn(columns, rows).to(dtype), torch.randn(_ROW, columns).to(dtype))
        for rows, columns in shapes
    ]
    work = sum(6 * _ROW * rows * columns for rows, columns in shapes)
    seconds = []
    for _ in range(num_rounds):
        start = time.perf_counter()
        for states, weight, slopes in tensors:
            torch.mm(states, weight.t())
            torch.mm(slopes, weight)
            torch.mm(slopes.t(), states)
        seconds.append(time.perf_counter() - start)
    return work / statistics.median(seconds)
