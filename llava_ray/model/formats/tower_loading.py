"""Loading of a frozen vision tower from the files of a model folder or hub id."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from transformers import MODEL_MAPPING, PreTrainedConfig

from llava_ray.model.formats.pretrained import check_amount, load_pretrained
from llava_ray.model.formats.sources import Source, find_part, make_config
from llava_ray.model.network.tower import VisionTower
from llava_ray.model.network.tower_families import WITH_TEXT_PART, find_depths, find_family


def read_tower_config(source: Source) -> PreTrainedConfig:
    """Read a tower's config; of a whole image-and-text model, its vision part. Raises ModelError."""
    config = make_config(source.config, source.folder, "vision tower")
    if config.model_type in WITH_TEXT_PART:
        config = config.vision_config
    find_family(config)
    return config


def load_vision_tower(
    tower: Source | str | Path,
    *,
    select_layer: int | Sequence[int],
    select_feature: str,
    s2_scales: Sequence[int] = (),
    dtype: torch.dtype = torch.float32,
) -> VisionTower:
    """Load a frozen tower. Raises ModelError for an unknown kind or an impossible layer."""
    source = tower if isinstance(tower, Source) else find_part(tower, "vision_tower")
    config = read_tower_config(source)
    find_depths(config, select_layer)
    if source.config.get("model_type") in WITH_TEXT_PART:
        seeing = {name: tensor for name, tensor in source.tensors.items() if name.startswith("vision_model.")}
        source = replace(source, tensors=seeing)
    check_amount(MODEL_MAPPING, config, source, "vision tower")
    backbone = load_pretrained(MODEL_MAPPING, config, source, "vision tower", dtype=dtype)
    return VisionTower(backbone, select_layer, select_feature, s2_scales).freeze()
