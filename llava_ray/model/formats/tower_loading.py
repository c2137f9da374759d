"""Loading of a frozen vision tower from the files of a model folder or hub id."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MODEL_MAPPING, AutoModel, BaseImageProcessor, PreTrainedConfig

from llava_ray.model.formats.layout import is_timm
from llava_ray.model.formats.pretrained import check_amount, load_pretrained
from llava_ray.model.formats.saved_weights import save_weights
from llava_ray.model.formats.sources import Source, find_part, make_config
from llava_ray.model.formats.timm_towers import load_timm, read_timm_config, save_timm
from llava_ray.model.network.timm_tower import TimmConfig, build_timm
from llava_ray.model.network.tower import VisionTower
from llava_ray.model.network.tower_families import WITH_TEXT_PART, find_depths, find_family


def read_tower_config(source: Source) -> PreTrainedConfig:
    """Read a tower's config; of a whole image-and-text model, its vision part. Raises ModelError."""
    if is_timm(source.config):
        return read_timm_config(source.config, source.beside)
    config = make_config(source.config, source.folder, "vision tower")
    if config.model_type in WITH_TEXT_PART:
        config = config.vision_config
    find_family(config)
    return config


def build_backbone(config: PreTrainedConfig) -> nn.Module:
    """Build a tower's modules with new weights. Raises ModelError."""
    if not isinstance(config, TimmConfig):
        backbone: nn.Module = AutoModel.from_config(config)
        return backbone
    backbone = build_timm(config.timm or {}, str(config.name_or_path))
    backbone.config = config  # type: ignore[assignment]
    return backbone


def save_tower(
    folder: Path, tower: VisionTower, tensors: Mapping[str, Tensor], image_processor: BaseImageProcessor
) -> None:
    """Write a tower's tensors with its config.json and image processor, which is the same file for timm.

    Raises BundleError for a tensor that is missing or unknown.
    """
    if isinstance(tower.config, TimmConfig):
        save_timm(folder, tower.config, tensors)
        return
    backbone: Any = tower.backbone
    save_weights(folder, backbone, tensors)
    image_processor.save_pretrained(folder)


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
    if isinstance(config, TimmConfig):
        return VisionTower(load_timm(config, source, dtype), select_layer, select_feature, s2_scales).freeze()
    if source.config.get("model_type") in WITH_TEXT_PART:
        seeing = {name: tensor for name, tensor in source.tensors.items() if name.startswith("vision_model.")}
        source = replace(source, tensors=seeing)
    check_amount(MODEL_MAPPING, config, source, "vision tower")
    backbone = load_pretrained(MODEL_MAPPING, config, source, "vision tower", dtype=dtype)
    return VisionTower(backbone, select_layer, select_feature, s2_scales).freeze()
