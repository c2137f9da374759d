"""The parts of a model, each loaded from where its blueprint says."""

from collections.abc import Mapping
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel

from llava_ray.config.geometry import FEATURE_NAMES
from llava_ray.config.lora import Quantization
from llava_ray.errors import ModelError
from llava_ray.model.blueprint import Blueprint
from llava_ray.model.formats.layout import Layout
from llava_ray.model.formats.layouts import read_layout
from llava_ray.model.formats.manifest import Manifest
from llava_ray.model.formats.names import IMAGE_NEWLINE
from llava_ray.model.formats.pretrained import check_amount, load_pretrained
from llava_ray.model.formats.projector_files import load_projector_weights
from llava_ray.model.formats.tower_loading import load_vision_tower
from llava_ray.model.network.embeddings import extend_embeddings
from llava_ray.model.network.packing import check_packing
from llava_ray.model.network.projector import adopt_projector, build_projector_of
from llava_ray.model.network.quantization import bitsandbytes_config, set_compute_dtype
from llava_ray.model.network.tower import VisionTower
from llava_ray.model.tensors.tensor_reading import read_tensors


def load_tower_of(blueprint: Blueprint, dtype: torch.dtype) -> VisionTower:
    """Load the tower that the blueprint names, frozen. Raises ModelError."""
    config = blueprint.config
    return load_vision_tower(
        blueprint.tower_source,
        select_layer=config.mm_vision_select_layer,
        select_feature=config.mm_vision_select_feature,
        s2_scales=blueprint.s2_scales,
        dtype=dtype,
    )


def check_language_model(blueprint: Blueprint) -> None:
    """Raise ModelError if the language model is none, or if its config describes another size than its weights'."""
    config = blueprint.language_config
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelError(
            f"{blueprint.language_source.folder}/config.json: models of type {config.model_type!r} do not write text; "
            "expected a causal language model."
        )
    check_amount(MODEL_FOR_CAUSAL_LM_MAPPING, config, blueprint.language_source, "language model")


def load_language_model(
    blueprint: Blueprint,
    dtype: torch.dtype,
    quantization: Quantization | None = None,
    embeddings: Tensor | None = None,
) -> PreTrainedModel:
    """Load the language model that the blueprint names, quantised as it is read, without an adapter over it.

    Its new tokens get the learnt ``embeddings``, or the mean of the others. Raises ModelError if it cannot be
    trained on packed rows.
    """
    config, wanted = blueprint.language_config, blueprint.config.attn_implementation
    # SDPA is transformers' own default, with eager where a model has none (Gemma 2); asked for by name it is refused.
    attention = None if wanted == "sdpa" else wanted
    model = load_pretrained(
        MODEL_FOR_CAUSAL_LM_MAPPING,
        config,
        blueprint.language_source,
        "language model",
        dtype=dtype,
        attn_implementation=attention,
        quantization_config=bitsandbytes_config(quantization, dtype) if quantization else None,
    )
    set_compute_dtype(model)
    extend_embeddings(model, blueprint.new_token_ids, embeddings)
    check_packing(model)
    return model


def load_projector(blueprint: Blueprint, manifest: Manifest, seed: int) -> nn.Module:
    """Return the projector that the config asks for: new, the folder's, or that of pretrain_mm_mlp_adapter.

    A new one depends on ``seed`` alone. Raises ModelError if the weights do not fit.
    """
    adapter = blueprint.config.pretrain_mm_mlp_adapter
    learnt = adapter is not None or blueprint.layout.settings
    with torch.random.fork_rng(devices=[]), torch.device("meta" if learnt else "cpu"):
        torch.default_generator.manual_seed(seed)
        projector = build_projector_of(manifest)
    if adapter is not None:
        _check_adapter(Path(adapter), manifest)
        adopt_projector(projector, load_projector_weights(adapter), adapter)
    elif blueprint.layout.settings:
        stored = blueprint.layout.part("projector")
        file = next((tensor.file for tensor in stored.values()), blueprint.layout.folder)
        adopt_projector(projector, read_tensors(stored), str(file))
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


def _check_adapter(source: Path, manifest: Manifest) -> None:
    """Raise ModelError if a folder's projector was trained on other features than it would get here."""
    trained = _describing_layout(source)
    if trained is None:
        return
    for key in FEATURE_NAMES:
        if (trained.settings.get(key) or ()) != (getattr(manifest, key) or ()):
            raise ModelError(
                f"the projector in {source} was trained with {key} {trained.settings.get(key)!r}, but the model is "
                f"configured with {getattr(manifest, key)!r}; set it as it was trained."
            )


def _describing_layout(source: Path) -> Layout | None:
    """Return what a folder says of its projector; None for a file or a folder that says nothing."""
    if not any((source / name).is_file() for name in ("llava.json", "config.json")):
        return None
    layout = read_layout(source)
    return layout if layout.settings else None
