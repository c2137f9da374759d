"""What must be known of a kind of vision tower and stands nowhere in its config.

Neither torch nor transformers, whose configs these functions take: layouts are read without them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from llava_ray.errors import ModelError


@dataclass(frozen=True)
class Family:
    """Facts about a kind of tower that its config does not state.

    ``num_prefix_tokens`` counts the tokens before the patches, ``blocks`` is where the transformer blocks are,
    ``tail`` names what only serves the pooled output or the final norm, ``unused`` parameters that have no part in any
    image's features, ``fixed_size`` is whether the tower takes images of one size only, ``patchified`` whether it
    wants them cut into patches already.
    """

    num_prefix_tokens: Callable[[Any], int]
    tail: tuple[str, ...]
    blocks: str = "encoder.layers"
    unused: tuple[str, ...] = ()
    fixed_size: bool = True
    patchified: bool = False


_CLIP = Family(num_prefix_tokens=lambda config: 1, tail=("post_layernorm",))


_SIGLIP = Family(num_prefix_tokens=lambda config: 0, tail=("post_layernorm", "head"))


_DINOV2 = Family(
    num_prefix_tokens=lambda config: 1,  # one class token
    tail=("layernorm",),
    blocks="encoder.layer",
    unused=("embeddings.mask_token",),
    fixed_size=False,
)


_DINOV2_WITH_REGISTERS = replace(_DINOV2, num_prefix_tokens=lambda config: 1 + config.num_register_tokens)


# SigLIP 2 comes in two kinds: for one size it is a SigLIP (also by its model type); this one takes any.
_SIGLIP2 = replace(_SIGLIP, fixed_size=False, patchified=True)


FAMILIES: dict[str, Family] = {
    "clip_vision_model": _CLIP,
    "siglip_vision_model": _SIGLIP,
    "siglip2_vision_model": _SIGLIP2,
    "dinov2": _DINOV2,
    "dinov2_with_registers": _DINOV2_WITH_REGISTERS,
}


# Every vision transformer of timm: its config.json has no model type, this is ours for it.
_TIMM = Family(
    num_prefix_tokens=lambda config: config.num_prefix_tokens,
    tail=("norm", "fc_norm", "head_drop", "head", "attn_pool"),
    blocks="blocks",
)


TIMM = "timm_vit"
WITH_TEXT_PART = ("clip", "siglip", "siglip2")  # configs of image-and-text models, whose vision part is the tower


def find_family(config: Any) -> Family:
    """Return what is known of this kind of tower. Raises ModelError for an unknown kind."""
    if config.model_type == TIMM:
        return _TIMM
    if config.model_type not in FAMILIES:
        raise ModelError(
            f"{config.name_or_path or 'the vision tower'} is of type {config.model_type!r}; known towers are "
            f"{', '.join(FAMILIES)} (and whole {' or '.join(WITH_TEXT_PART)} models), and "
            "timm's vision transformers. Choose one of these."
        )
    return FAMILIES[config.model_type]


def _find_depth(config: Any, select_layer: int) -> int:
    """Turn an index into the hidden states (0 is the embeddings) into a number of blocks. Raises ModelError."""
    num_blocks: int = config.num_hidden_layers
    depth = select_layer if select_layer >= 0 else num_blocks + 1 + select_layer
    if not 0 <= depth <= num_blocks:
        raise ModelError(
            f"mm_vision_select_layer is {select_layer}, but the tower has {num_blocks} blocks; "
            f"expected {-num_blocks - 1} to {num_blocks} (0 is the embeddings, -1 the last block)."
        )
    return depth


def find_depths(config: Any, select_layer: int | Sequence[int]) -> tuple[int, ...]:
    """Return the number of blocks before each selected hidden state, in the order given. Raises ModelError."""
    layers = [select_layer] if isinstance(select_layer, int) else select_layer
    return tuple(_find_depth(config, layer) for layer in layers)
