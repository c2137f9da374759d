"""Towers of transformers: CLIP, SigLIP, SigLIP 2 and DINOv2."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedConfig

from llava_ray.model.network.tower_families import find_family


class TransformersNetwork:
    """A tower that is one of transformers' models (see ``TowerNetwork``)."""

    def __init__(self, config: PreTrainedConfig) -> None:
        """Look up what is known of this kind. Raises ModelError for an unknown one."""
        self.config = config
        self.family = find_family(config)

    def extract(
        self, backbone: nn.Module, pixel_values: Float[Tensor, "n 3 h w"], depths: Sequence[int]
    ) -> Float[Tensor, "n t v"]:
        """Return hidden states side by side."""
        inputs = patchified(pixel_values, self.config.patch_size) if self.family.patchified else {}
        inputs = inputs or {"pixel_values": pixel_values}
        if len(depths) == 1:
            last: Tensor = backbone(**inputs).last_hidden_state
            return last
        states = backbone(**inputs, output_hidden_states=True).hidden_states
        return torch.cat([states[depth] for depth in depths], dim=-1)

    def enable_checkpointing(self, backbone: nn.Module) -> None:
        """Let the blocks compute their activations again in the backward pass."""
        model: Any = backbone
        model.gradient_checkpointing_enable({"use_reentrant": False})


def patchified(pixel_values: Float[Tensor, "n 3 h w"], patch_size: int) -> dict[str, Any]:
    """Return what a SigLIP 2 for any aspect ratio takes: patches as rows of values, and their grid."""
    num_images, channels, height, width = pixel_values.shape
    rows, columns = height // patch_size, width // patch_size
    squares = pixel_values.reshape(num_images, channels, rows, patch_size, columns, patch_size)
    return {
        "pixel_values": squares.permute(0, 2, 4, 3, 5, 1).reshape(num_images, rows * columns, -1),
        "pixel_attention_mask": None,  # nothing is padding
        "spatial_shapes": torch.tensor([[rows, columns]] * num_images),
    }
