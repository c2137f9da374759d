"""Conversion of tensor names between ours and the original layout: pure renames, without loss."""

import re

from llava_ray.model.formats.names import (
    IMAGE_NEWLINE,
    LANGUAGE_MODEL_PREFIX,
    PROJECTOR_PREFIX,
    VISION_MODEL_PREFIX,
    VISION_TOWER_PREFIX,
)

ORIGINAL_PROJECTOR = "model.mm_projector."


_ORIGINAL_TOWER = "model.vision_tower.vision_tower."


_ORIGINAL_NEWLINE = "model.image_newline"


# Prefix of each name in an original adapter's non_lora_trainables.bin.
PEFT_PREFIX = "base_model.model."


def to_original(name: str) -> str:
    """Return the original layout's name of one of our tensors."""
    if name.startswith(PROJECTOR_PREFIX):
        return ORIGINAL_PROJECTOR + name.removeprefix(PROJECTOR_PREFIX)
    if name.startswith(VISION_TOWER_PREFIX):
        return _ORIGINAL_TOWER + VISION_MODEL_PREFIX + name.removeprefix(VISION_TOWER_PREFIX)
    return _ORIGINAL_NEWLINE if name == IMAGE_NEWLINE else name.removeprefix(LANGUAGE_MODEL_PREFIX)


def from_original(name: str) -> str:
    """Return the canonical name of a tensor in the original layout, with or without PEFT's prefix."""
    own = name.removeprefix(PEFT_PREFIX)
    if projector := re.search(r"(?:^|\.)mm_projector\.(.+)", own):
        return f"projector.{projector[1]}"
    if own.startswith("model.vision_tower.vision_tower."):
        return f"vision_tower.{own.removeprefix('model.vision_tower.vision_tower.')}"
    return IMAGE_NEWLINE if own == "model.image_newline" else f"language_model.{own}"
