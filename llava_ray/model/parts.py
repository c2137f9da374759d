"""The three parts of a model, each loaded from where its blueprint says."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from llava_ray.config.lora import Quantization
from llava_ray.errors import ModelError
from llava_ray.model.blueprint import Blueprint
from llava_ray.model.manifest import Manifest, is_bundle, read_manifest
from llava_ray.model.packing import check_packing
from llava_ray.model.projector import adopt_projector, build_projector, load_projector_weights
from llava_ray.model.quantization import bitsandbytes_config, settle
from llava_ray.model.sources import check_loaded, loading
from llava_ray.model.tower import VisionTower, load_vision_tower


def load_tower_of(blueprint: Blueprint, dtype: torch.dtype) -> VisionTower:
    """Load the tower that the blueprint names, frozen. Raises ModelError."""
    config = blueprint.config
    return load_vision_tower(
        blueprint.tower_source.folder,
        select_layer=config.mm_vision_select_layer,
        select_feature=config.mm_vision_select_feature,
        dtype=dtype,
    )


def load_language_model(
    blueprint: Blueprint, dtype: torch.dtype, quantization: Quantization | None = None
) -> PreTrainedModel:
    """Load the language model that the blueprint names, quantised as it is read.

    Raises ModelError if it cannot be trained on packed rows.
    """
    folder, wanted = blueprint.language_source.folder, blueprint.config.attn_implementation
    # SDPA is transformers' own default, with eager where a model has none (Gemma 2); asked for by name it is refused.
    attention = None if wanted == "sdpa" else wanted
    with loading(folder, "language model"):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation=attention,
            quantization_config=bitsandbytes_config(quantization, dtype) if quantization else None,
            output_loading_info=True,
        )
    model: PreTrainedModel = loaded[0]
    check_loaded(loaded[1], folder, "language model")
    settle(model)
    check_packing(model)
    return model


def load_projector(blueprint: Blueprint, manifest: Manifest, seed: int) -> nn.Module:
    """Return the projector that the config asks for: new, the bundle's, or that of pretrain_mm_mlp_adapter.

    A new one depends on ``seed`` alone. Raises ModelError if the weights do not fit.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        projector = build_projector(manifest.mm_projector_type, manifest.mm_hidden_size, manifest.hidden_size)
    source = blueprint.config.pretrain_mm_mlp_adapter or blueprint.bundle
    if source is not None:
        check_adapter(Path(source), manifest)
        adopt_projector(projector, load_projector_weights(source), str(source))
    return projector


def check_adapter(source: Path, manifest: Manifest) -> None:
    """Raise ModelError if a bundle's projector was trained on other features than it would get here."""
    if not is_bundle(source):
        return
    trained = read_manifest(source)
    for key in ("mm_vision_select_layer", "mm_vision_select_feature"):
        if getattr(trained, key) != getattr(manifest, key):
            raise ModelError(
                f"the projector in {source} was trained with {key} {getattr(trained, key)!r}, but the model is "
                f"configured with {getattr(manifest, key)!r}; set it as it was trained."
            )
