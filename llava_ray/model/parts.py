"""The three parts of a model, each loaded from where its blueprint says."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from llava_ray.errors import ModelError
from llava_ray.model.blueprint import Blueprint
from llava_ray.model.manifest import Manifest, is_bundle, read_manifest
from llava_ray.model.packing import check_packing
from llava_ray.model.projector import IMAGE_NEWLINE, adopt_projector, build_projector, load_projector_weights
from llava_ray.model.sources import check_loaded, loading
from llava_ray.model.tower import VisionTower, load_vision_tower
from llava_ray.model.vocabulary import extend_embeddings


def load_tower_of(blueprint: Blueprint, dtype: torch.dtype) -> VisionTower:
    """Load the tower that the blueprint names, frozen. Raises ModelError."""
    config = blueprint.config
    return load_vision_tower(
        blueprint.tower_source.folder,
        select_layer=config.mm_vision_select_layer,
        select_feature=config.mm_vision_select_feature,
        s2_scales=blueprint.s2_scales,
        dtype=dtype,
    )


def load_language_model(blueprint: Blueprint, dtype: torch.dtype, embeddings: Tensor | None = None) -> PreTrainedModel:
    """Load the language model that the blueprint names, with embeddings for its new tokens: learnt ones, or the mean.

    Raises ModelError if it cannot be trained on packed rows.
    """
    folder, wanted = blueprint.language_source.folder, blueprint.config.attn_implementation
    # SDPA is transformers' own default, with eager where a model has none (Gemma 2); asked for by name it is refused.
    attention = None if wanted == "sdpa" else wanted
    with loading(folder, "language model"):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, attn_implementation=attention, output_loading_info=True
        )
    model: PreTrainedModel = loaded[0]
    check_loaded(loaded[1], folder, "language model")
    extend_embeddings(model, blueprint.new_token_ids, embeddings)
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


def find_newline(blueprint: Blueprint, companions: Mapping[str, Tensor], seed: int) -> Float[Tensor, " d"]:
    """Return the vector that ends a row of patches: learnt, or as it begins in the original, N(0, 1) / sqrt(d).

    A new one depends on ``seed`` alone. Raises ModelError if the learnt one is of another width.
    """
    width = blueprint.hidden_size
    learnt = companions.get(IMAGE_NEWLINE)
    if learnt is None:
        return torch.randn(width, generator=torch.Generator().manual_seed(seed)) / width**0.5
    if learnt.shape != (width,):
        raise ModelError(
            f"image_newline of the projector's file has shape {tuple(learnt.shape)}, but the language model is {width} "
            "wide; use the language model that it was trained with."
        )
    return learnt


def check_adapter(source: Path, manifest: Manifest) -> None:
    """Raise ModelError if a bundle's projector was trained on other features than it would get here."""
    if not is_bundle(source):
        return
    trained = read_manifest(source)
    for key in ("mm_vision_select_layer", "mm_vision_select_feature", "s2_scales"):
        if getattr(trained, key) != getattr(manifest, key):
            raise ModelError(
                f"the projector in {source} was trained with {key} {getattr(trained, key)!r}, but the model is "
                f"configured with {getattr(manifest, key)!r}; set it as it was trained."
            )
