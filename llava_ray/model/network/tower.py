"""The vision tower: a backbone of transformers or timm that stops at the last selected layer."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedConfig

from llava_ray.config.geometry import compute_feature_width
from llava_ray.model.network.multiscale import extract_multiscale
from llava_ray.model.network.timm_tower import TimmConfig, TimmNetwork
from llava_ray.model.network.tower_families import Family, find_depths
from llava_ray.model.network.tower_protocol import TowerNetwork
from llava_ray.model.network.transformers_tower import TransformersNetwork

IMAGES_PER_FORWARD = 64  # of a frozen tower: bounds the activations that live at one time


class VisionTower(nn.Module):
    """A vision tower that returns patch features of the selected layers, and with S2 of several scales.

    Blocks after the last of these layers never run; they are set aside (unregistered: they stay on the CPU) and come
    back in ``full_state_dict``.
    """

    def __init__(
        self,
        backbone: nn.Module,
        select_layer: int | Sequence[int],
        select_feature: str,
        s2_scales: Sequence[int] = (),
    ) -> None:
        """Truncate ``backbone`` after the last ``select_layer`` (an index into its hidden states, or several).

        ``s2_scales`` are sides in pixels, multiples of the smallest. Raises ModelError.
        """
        super().__init__()
        config: Any = backbone.config
        self.network = find_network(config)
        self.family = self.network.family
        self.config = config
        self.num_prefix_tokens = self.family.num_prefix_tokens(config)
        self.num_skipped = 0 if select_feature == "cls_patch" else self.num_prefix_tokens
        self.select_feature = select_feature
        self.select_layer = select_layer
        self.s2_scales = tuple(sorted(s2_scales))
        self.depths = find_depths(config, select_layer)
        self.hidden_size = compute_feature_width(config.hidden_size, select_layer, s2_scales)
        self._idle = _truncate_backbone(backbone, self.family, max(self.depths))
        self.backbone = backbone

    def forward(self, pixel_values: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n p v"]:
        """Return the features of each image's patches, in the tower's dtype."""
        weight = next(self.backbone.parameters())
        pixel_values = pixel_values.to(weight.device, weight.dtype)
        if self.s2_scales:
            return extract_multiscale(self.select, pixel_values, self.s2_scales)
        return self.select(pixel_values)

    def select(self, pixel_values: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n p v"]:
        """Return the features at one scale; those of several layers side by side."""
        hidden = self.network.extract(self.backbone, pixel_values, self.depths)
        return hidden[:, self.num_skipped :]

    @property
    def passes_per_view(self) -> int:
        """Count the backbone's inputs for one view: with S2 one for each square of each scale."""
        return sum((scale // self.s2_scales[0]) ** 2 for scale in self.s2_scales) or 1

    @torch.no_grad()
    def extract(self, views: Tensor, prepare: Callable[[Tensor], Tensor] = lambda views: views) -> Tensor:
        """Return the features (n, p, v) of any number of views without gradients, a bounded number at a time.

        ``prepare`` makes of views what the tower takes, such as normalised pixels of those that travelled as bytes.
        """
        device = next(self.backbone.parameters()).device
        chunks = views.split(max(1, IMAGES_PER_FORWARD // self.passes_per_view))
        return torch.cat([self(prepare(some.to(device))) for some in chunks])

    def blank_features(self) -> Float[Tensor, "1 p v"]:
        """Return the features of one black image of the smallest size: what uses every parameter at the least cost."""
        side = min(self.s2_scales) if self.s2_scales else self.config.patch_size
        if self.family.fixed_size:
            side = self.config.image_size
        weight = next(self.backbone.parameters())
        hidden = self.select(torch.zeros(1, 3, side, side, device=weight.device, dtype=weight.dtype))
        return hidden.repeat(1, 1, self.hidden_size // hidden.shape[-1])

    def freeze(self) -> "VisionTower":
        """Freeze all parameters of the tower, and switch its dropout off."""
        return self.requires_grad_(False).eval()

    def unfreeze(self) -> "VisionTower":
        """Make all parameters trainable that affect the tower's features."""
        self.requires_grad_(True)
        for name in self.family.unused:
            self.backbone.get_parameter(name).requires_grad_(False)
        return self

    def enable_checkpointing(self) -> None:
        """Let the blocks compute their activations again in the backward pass."""
        self.network.enable_checkpointing(self.backbone)

    def full_state_dict(self) -> dict[str, Tensor]:
        """Return the tensors of the whole backbone, those set aside included, under their usual names."""
        state = dict(self.backbone.state_dict())
        for prefix, module in self._idle.items():
            state |= {f"{prefix}.{name}": tensor for name, tensor in module.state_dict().items()}
        return state


def find_network(config: PreTrainedConfig) -> TowerNetwork:
    """Return how a kind of tower is used. Raises ModelError for an unknown kind."""
    return TimmNetwork(config) if isinstance(config, TimmConfig) else TransformersNetwork(config)


def _truncate_backbone(backbone: nn.Module, family: Family, depth: int) -> dict[str, nn.Module]:
    """Leave ``depth`` blocks in ``backbone`` and no final norm; return the modules taken out, by name.

    Its last hidden state is then hidden state number ``depth`` of the whole backbone.
    """
    parent, _, name = family.blocks.rpartition(".")
    blocks = backbone.get_submodule(family.blocks)
    assert isinstance(blocks, nn.ModuleList | nn.Sequential)
    idle: dict[str, nn.Module] = {f"{family.blocks}.{i}": blocks[i] for i in range(depth, len(blocks))}
    setattr(backbone.get_submodule(parent), name, blocks[:depth])
    for tail in family.tail:
        if tail in dict(backbone.named_children()):
            idle[tail] = backbone.get_submodule(tail)
            setattr(backbone, tail, nn.Identity())
    if "head" in idle and family.patchified:
        backbone.__dict__["use_head"] = False  # it is called with a mask, which Identity does not take
    return idle
