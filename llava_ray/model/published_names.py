"""Names of tensors in the published layouts: pure renames from and to ours, and back without loss.

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

The hub's names are those that transformers before 4.52 and vLLM know; transformers still loads them. Newer files may
hold transformers' own names (``model.language_model.…``), which are read too. A DINOv2 tower has no ``vision_model``
level in any layout.
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
# transformers' names since 4.52, as the layout had them before.
HUB_RENAMED = (
    ("model.language_model.", "language_model.model."),
    ("model.vision_tower.", VISION_TOWER),
    ("model.multi_modal_projector.", HUB_PROJECTOR),
    ("model.image_newline", IMAGE_NEWLINE),
    ("lm_head.", "language_model.lm_head."),
)


def from_original(name: str) -> str:
    """Return our name of a tensor in the original layout."""
    if name.startswith(ORIGINAL_PROJECTOR):
        return PROJECTOR + name.removeprefix(ORIGINAL_PROJECTOR)
    if name.startswith(ORIGINAL_TOWER):
        return VISION_TOWER + bare_tower_name(name.removeprefix(ORIGINAL_TOWER))
    return IMAGE_NEWLINE if name == ORIGINAL_NEWLINE else LANGUAGE_MODEL + name


def to_original(name: str) -> str:
    """Return the original layout's name of one of our tensors."""
    if name.startswith(PROJECTOR):
        return ORIGINAL_PROJECTOR + name.removeprefix(PROJECTOR)
    if name.startswith(VISION_TOWER):
        return ORIGINAL_TOWER + VISION_MODEL + name.removeprefix(VISION_TOWER)
    return ORIGINAL_NEWLINE if name == IMAGE_NEWLINE else name.removeprefix(LANGUAGE_MODEL)


def from_hub(name: str) -> str:
    """Return our name of a tensor in the hub layout, under transformers' old or new names."""
    for new, old in HUB_RENAMED:
        if name.startswith(new):
            name = old + name.removeprefix(new)
            break
    if name.startswith(VISION_TOWER):
        return VISION_TOWER + bare_tower_name(name.removeprefix(VISION_TOWER))
    for linear, index in HUB_LINEARS.items():
        if name.startswith(HUB_PROJECTOR + linear):
            return PROJECTOR + index + name.removeprefix(HUB_PROJECTOR + linear)
    return name


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
