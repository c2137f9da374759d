"""Conversion of tensor names between ours and the hub layout: pure renames, without loss."""

import re

from llava_ray.model.formats.names import IMAGE_NEWLINE, PROJECTOR_PREFIX, VISION_MODEL_PREFIX, VISION_TOWER_PREFIX

_HUB_PROJECTOR = "multi_modal_projector."


_HUB_LINEARS = {"linear_1.": "0.", "linear_2.": "2."}


def to_hub(name: str, *, vision_model: bool) -> str:
    """Return the hub layout's name of one of our tensors; ``vision_model`` if its tower has that level."""
    if name.startswith(VISION_TOWER_PREFIX) and vision_model:
        return VISION_TOWER_PREFIX + VISION_MODEL_PREFIX + name.removeprefix(VISION_TOWER_PREFIX)
    for linear, index in _HUB_LINEARS.items():
        if name.startswith(PROJECTOR_PREFIX + index):
            return _HUB_PROJECTOR + linear + name.removeprefix(PROJECTOR_PREFIX + index)
    return name


def from_hub(name: str) -> str:
    """Return the canonical name of a tensor in transformers' LLaVA layout, of older or newer versions."""
    own = name.removeprefix("model.")
    if projector := re.fullmatch(r"multi_modal_projector\.linear_([12])\.(weight|bias)", own):
        return f"projector.{2 * int(projector[1]) - 2}.{projector[2]}"
    if own.startswith("vision_tower.") or own == IMAGE_NEWLINE:
        return own
    if name.startswith("model.language_model."):
        return f"language_model.model.{name.removeprefix('model.language_model.')}"
    return name if name.startswith("language_model.") else f"language_model.{name}"
