"""Names of tensors in the published layouts: pure renames of ours, which ``published_layouts`` turns back without loss.

========================== ====================================================== ======================================
ours                       original (liuhaotian/llava-…)                          hub (llava-hf/…)
========================== ====================================================== ======================================
projector.0.weight         model.mm_projector.0.weight                            multi_modal_projector.linear_1.weight
projector.2.weight         model.mm_projector.2.weight                            multi_modal_projector.linear_2.weight
projector.weight (linear)  model.mm_projector.weight                              (cannot be expressed)
image_newline              model.image_newline                                    image_newline
language_model.model.…     model.…                                                language_model.model.…
language_model.lm_head.…   lm_head.…                                              language_model.lm_head.…
vision_tower.…             model.vision_tower.vision_tower.vision_model.…         vision_tower.vision_model.…
========================== ====================================================== ======================================

The hub's names are those that transformers before 4.52 and vLLM know; transformers still loads them. A DINOv2 tower
has no ``vision_model`` level in any layout.
"""

import re

# What older files hold beside the weights: tables that every model computes for itself.
COMPUTED = re.compile(r"(\.inv_freq|\.position_ids)$")

PROJECTOR = "projector."
LANGUAGE_MODEL = "language_model."
VISION_TOWER = "vision_tower."
IMAGE_NEWLINE = "image_newline"
VISION_MODEL = "vision_model."

ORIGINAL_PROJECTOR = "model.mm_projector."
ORIGINAL_TOWER = "model.vision_tower.vision_tower."
ORIGINAL_NEWLINE = "model.image_newline"
# Before each name in an original adapter's non_lora_trainables.bin.
PEFT_PREFIX = "base_model.model."

HUB_PROJECTOR = "multi_modal_projector."
HUB_LINEARS = {"linear_1.": "0.", "linear_2.": "2."}


def to_original(name: str) -> str:
    """Return the original layout's name of one of our tensors."""
    if name.startswith(PROJECTOR):
        return ORIGINAL_PROJECTOR + name.removeprefix(PROJECTOR)
    if name.startswith(VISION_TOWER):
        return ORIGINAL_TOWER + VISION_MODEL + name.removeprefix(VISION_TOWER)
    return ORIGINAL_NEWLINE if name == IMAGE_NEWLINE else name.removeprefix(LANGUAGE_MODEL)


def to_hub(name: str, *, vision_model: bool) -> str:
    """Return the hub layout's name of one of our tensors; ``vision_model`` is whether its tower has that level."""
    if name.startswith(VISION_TOWER) and vision_model:
        return VISION_TOWER + VISION_MODEL + name.removeprefix(VISION_TOWER)
    for linear, index in HUB_LINEARS.items():
        if name.startswith(PROJECTOR + index):
            return HUB_PROJECTOR + linear + name.removeprefix(PROJECTOR + index)
    return name


def bare_tower_name(name: str) -> str:
    """Return a tower's tensor name without the level that only some versions of transformers write."""
    return name.removeprefix(VISION_MODEL)
