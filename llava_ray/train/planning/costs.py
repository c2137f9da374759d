"""The time that a sample takes in training, estimated from configs alone: what rows are dealt to ranks by."""

from typing import Any

from llava_ray.config.finetune import FinetuneConfig
from llava_ray.data.row_assignment import SampleCost
from llava_ray.model.blueprint import Blueprint
from llava_ray.model.network.attention_shape import AttentionShape
from llava_ray.model.network.tower_families import find_depths, find_family


def estimate_cost(config: FinetuneConfig, blueprint: Blueprint) -> SampleCost:
    """Return the operations of a token, of a pair of tokens and of an image.

    How samples compare is what counts: passes that all have in common, such as one that computes activations again,
    would not change it. An image whose features are computed elsewhere costs no more than its tokens.
    """
    text: Any = blueprint.language_config.get_text_config()
    hidden, attention = int(text.hidden_size), AttentionShape.of(text)
    inner = int(getattr(text, "intermediate_size", None) or 4 * hidden)
    projections = 2 * hidden * attention.head_width * (attention.num_heads + attention.num_keys)
    layer = projections + 3 * hidden * inner
    # Forward, gradients of activations and, where the weights themselves learn, of these.
    still = config.model.tune_mm_mlp_adapter or config.model.freeze_backbone or config.lora.lora_enable
    passes = 2 if still else 3
    layers = int(text.num_hidden_layers)
    return SampleCost(
        token=2 * passes * layers * layer, pair=12 * layers * attention.width, image=_image_cost(config, blueprint)
    )


def _image_cost(config: FinetuneConfig, blueprint: Blueprint) -> float:
    """Return the operations of the tower for one image; 0 where it does not run in the train workers."""
    if config.data.vision_features != "inline":
        return 0.0
    tower: Any = blueprint.tower_config
    width = int(tower.hidden_size)
    inner = int(getattr(tower, "intermediate_size", None) or width * getattr(tower, "mlp_ratio", 4))
    side = min(blueprint.s2_scales) if blueprint.s2_scales else blueprint.image_spec.height
    patches = (side // int(tower.patch_size)) ** 2
    positions = patches + find_family(tower).num_prefix_tokens(tower)
    block = 2 * positions * (4 * width**2 + 2 * width * inner) + 4 * width * positions**2
    squares = sum((scale // side) ** 2 for scale in blueprint.s2_scales) or 1
    # An image cut into views has a view of the whole and about as many tiles as its canvas has on average.
    views = 1 + _mean_tiles(blueprint)
    blocks = max(find_depths(tower, config.model.mm_vision_select_layer)) * block
    patching = 2 * patches * 3 * int(tower.patch_size) ** 2 * width
    learns = config.model.unfreeze_mm_vision_tower
    return float(views * squares * ((3 * blocks + 2 * patching) if learns else blocks + patching))


def _mean_tiles(blueprint: Blueprint) -> float:
    """Return how many tiles beside the whole image the canvases of anyres have on average; 0 without them."""
    pinpoints, spec = blueprint.image_tokens.grid_pinpoints, blueprint.image_spec
    tiles = [(width // spec.width) * (height // spec.height) for width, height in pinpoints or ()]
    return sum(tiles) / len(tiles) if tiles else 0.0
