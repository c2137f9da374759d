"""The vision tower: a CLIP, SigLIP or DINOv2 backbone that stops at the selected layer."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import MODEL_MAPPING, PreTrainedConfig, PreTrainedModel

from llava_ray.errors import ModelError
from llava_ray.model.pretrained import load_pretrained
from llava_ray.model.sources import Source, find_part, make_config


@dataclass(frozen=True)
class Family:
    """What must be known of a kind of tower and stands nowhere in its config.

    ``num_prefix_tokens`` counts the tokens before the patches, ``blocks`` is where the transformer blocks are,
    ``tail`` names what only serves the pooled output or the final norm, ``fixed_size`` is whether the tower takes
    images of one size only.
    """

    num_prefix_tokens: Callable[[Any], int]
    tail: tuple[str, ...]
    blocks: str = "encoder.layers"
    fixed_size: bool = True


CLIP = Family(num_prefix_tokens=lambda config: 1, tail=("post_layernorm",))
SIGLIP = Family(num_prefix_tokens=lambda config: 0, tail=("post_layernorm", "head"))
DINOV2 = Family(
    num_prefix_tokens=lambda config: 1, tail=("layernorm",), blocks="encoder.layer", fixed_size=False
)  # one class token
DINOV2_WITH_REGISTERS = Family(
    num_prefix_tokens=lambda config: 1 + config.num_register_tokens,
    tail=("layernorm",),
    blocks="encoder.layer",
    fixed_size=False,
)

FAMILIES: dict[str, Family] = {
    "clip_vision_model": CLIP,
    "siglip_vision_model": SIGLIP,
    "dinov2": DINOV2,
    "dinov2_with_registers": DINOV2_WITH_REGISTERS,
}
WITH_TEXT_PART = ("clip", "siglip")  # configs of image-and-text models, whose vision part is the tower


class VisionTower(nn.Module):
    """Patch features of the selected layer.

    Blocks after that layer never run; they are set aside (unregistered: they stay on the CPU) and come back in
    ``full_state_dict``.
    """

    def __init__(self, backbone: PreTrainedModel, select_layer: int, select_feature: str) -> None:
        """Cut ``backbone`` after ``select_layer`` (an index into its hidden states). Raises ModelError."""
        super().__init__()
        config = backbone.config
        family = find_family(config)
        self.config = config
        self.hidden_size: int = config.hidden_size
        self.num_prefix_tokens = family.num_prefix_tokens(config)
        self.num_skipped = 0 if select_feature == "cls_patch" else self.num_prefix_tokens
        self.select_feature = select_feature
        self.select_layer = select_layer
        self._idle = cut(backbone, family, find_depth(config, select_layer))
        self.backbone = backbone

    def forward(self, pixel_values: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n p v"]:
        """Return the features of each image's patches, in the tower's dtype."""
        pixel_values = pixel_values.to(self.backbone.device, self.backbone.dtype)
        hidden: Tensor = self.backbone(pixel_values=pixel_values).last_hidden_state
        return hidden[:, self.num_skipped :]

    def num_image_tokens(self, height: int, width: int) -> int:
        """Count the features of an image of that many pixels."""
        return count_image_tokens(self.config, self.select_feature, height, width)

    def freeze(self) -> "VisionTower":
        """Let nothing of the tower learn, and switch its dropout off."""
        return self.requires_grad_(False).eval()

    def full_state_dict(self) -> dict[str, Tensor]:
        """Return the tensors of the whole backbone, those set aside included, under their usual names."""
        state = dict(self.backbone.state_dict())
        for prefix, module in self._idle.items():
            state |= {f"{prefix}.{name}": tensor for name, tensor in module.state_dict().items()}
        return state


def find_family(config: PreTrainedConfig) -> Family:
    """Return what is known of this kind of tower. Raises ModelError for an unknown kind."""
    if config.model_type not in FAMILIES:
        raise ModelError(
            f"{config.name_or_path or 'the vision tower'} is of type {config.model_type!r}; known towers are "
            f"{', '.join(FAMILIES)} (and whole {' or '.join(WITH_TEXT_PART)} models). Choose one of these."
        )
    return FAMILIES[config.model_type]


def find_depth(config: PreTrainedConfig, select_layer: int) -> int:
    """Turn an index into the hidden states (0 is the embeddings) into a number of blocks. Raises ModelError."""
    num_blocks: int = config.num_hidden_layers
    depth = select_layer if select_layer >= 0 else num_blocks + 1 + select_layer
    if not 0 <= depth <= num_blocks:
        raise ModelError(
            f"mm_vision_select_layer is {select_layer}, but the tower has {num_blocks} blocks; "
            f"expected {-num_blocks - 1} to {num_blocks} (0 is the embeddings, -1 the last block)."
        )
    return depth


def count_image_tokens(config: PreTrainedConfig, select_feature: str, height: int, width: int) -> int:
    """Count the features that a tower with this config gives for an image of ``height`` x ``width`` pixels."""
    prefix = find_family(config).num_prefix_tokens(config) if select_feature == "cls_patch" else 0
    patch_size: int = config.patch_size
    return (height // patch_size) * (width // patch_size) + prefix


def cut(backbone: PreTrainedModel, family: Family, depth: int) -> dict[str, nn.Module]:
    """Leave ``depth`` blocks in ``backbone`` and no final norm; return the modules taken out, by name.

    Its last hidden state is then hidden state number ``depth`` of the whole backbone.
    """
    parent, _, name = family.blocks.rpartition(".")
    blocks = backbone.get_submodule(family.blocks)
    assert isinstance(blocks, nn.ModuleList)
    idle: dict[str, nn.Module] = {f"{family.blocks}.{i}": blocks[i] for i in range(depth, len(blocks))}
    setattr(backbone.get_submodule(parent), name, blocks[:depth])
    for tail in family.tail:
        if tail in dict(backbone.named_children()):
            idle[tail] = backbone.get_submodule(tail)
            setattr(backbone, tail, nn.Identity())
    return idle


def read_tower_config(source: Source) -> PreTrainedConfig:
    """Read a tower's config; of a whole CLIP or SigLIP model, its vision part. Raises ModelError."""
    config = make_config(source.config, source.folder, "vision tower")
    if config.model_type in WITH_TEXT_PART:
        config = config.vision_config
    find_family(config)
    return config


def load_vision_tower(
    tower: Source | str | Path, *, select_layer: int, select_feature: str, dtype: torch.dtype = torch.float32
) -> VisionTower:
    """Load a frozen tower. Raises ModelError for an unknown kind or an impossible layer."""
    source = tower if isinstance(tower, Source) else find_part(tower, "vision_tower")
    config = read_tower_config(source)
    find_depth(config, select_layer)
    if source.config.get("model_type") in WITH_TEXT_PART:
        seeing = {name: tensor for name, tensor in source.tensors.items() if name.startswith("vision_model.")}
        source = replace(source, tensors=seeing)
    backbone = load_pretrained(MODEL_MAPPING, config, source, "vision tower", dtype=dtype)
    return VisionTower(backbone, select_layer, select_feature).freeze()
