"""Loading of a model's parts from the places in its blueprint."""

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
from llava_ray.reading import short_repr


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
    """Raise ModelError for anything but a causal language model, or if its config and weights differ in size."""
    config = blueprint.language_config
    _check_not_quantized(blueprint)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelError(
            f"{blueprint.language_source.folder}/config.json: models of type {config.model_type!r} do not generate "
            "text; expected a causal language model."
        )
    check_amount(MODEL_FOR_CAUSAL_LM_MAPPING, config, blueprint.language_source, "language model")


def _check_not_quantized(blueprint: Blueprint) -> None:
    """Raise ModelError for weights that are stored in a quantised form, such as AWQ or GPTQ."""
    for config in (blueprint.layout.config, blueprint.language_source.config):
        stored = config.get("quantization_config")
        method = stored.get("quant_method") if isinstance(stored, Mapping) else stored
        if method not in (None, "bitsandbytes"):
            name = short_repr(str(method))
            raise ModelError(
                f"{blueprint.language_source.folder}: its weights are quantised on disk ({name} in "
                "quantization_config of its config.json), which vLLM reads and nothing else here. Serve it with "
                f"engine=vllm engine.quantization={method if isinstance(method, str) else 'METHOD'}, or use the model "
                "that it was made from."
            )


def load_language_model(
    blueprint: Blueprint,
    dtype: torch.dtype,
    quantization: Quantization | None = None,
    embeddings: Tensor | None = None,
) -> PreTrainedModel:
    """Load the language model that the blueprint names, quantised while loading, without its adapter.

    Its new tokens get the trained ``embeddings``, or the mean of the others. Raises ModelError if it cannot be trained
    on packed rows.
    """
    config, wanted = blueprint.language_config, blueprint.config.attn_implementation
    # SDPA is transformers' default, with eager attention for models without it (Gemma 2), which refuse it by name.
    # A training run switches "sdpa" to attention by sample (Llava.attend_by_sample).
    attention = "eager" if wanted == "eager" else None
    model = load_pretrained(
        MODEL_FOR_CAUSAL_LM_MAPPING,
        config,
        blueprint.language_source,
        "language model",
        dtype=dtype,
        attn_implementation=attention,
        quantization_config=bitsandbytes_config(quantization, dtype) if quantization else None,
    )
    # Probe packing last, with the final embeddings: an unsupported model fails here and not after hours of training.
    set_compute_dtype(model)
    extend_embeddings(model, blueprint.new_token_ids, embeddings)
    check_packing(model)
    return model


def load_projector(blueprint: Blueprint, manifest: Manifest, seed: int) -> nn.Module:
    """Load or build the configured projector: a new one, the folder's, or that of pretrain_mm_mlp_adapter.

    A new one depends on ``seed`` alone. Raises ModelError if the weights do not fit.
    """
    adapter = blueprint.config.pretrain_mm_mlp_adapter
    is_trained = adapter is not None or blueprint.layout.settings
    # On the meta device a projector whose weights are loaded below takes no time to initialise.
    with torch.random.fork_rng(devices=[]), torch.device("meta" if is_trained else "cpu"):
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
    """Return the vector that ends a row of patches: the trained one, or the original's initial N(0, 1) / sqrt(d).

    A new one depends on ``seed`` alone. Raises ModelError if the trained one has another width.
    """
    width = blueprint.hidden_size
    trained = companions.get(IMAGE_NEWLINE)
    if trained is None:
        return torch.randn(width, generator=torch.Generator().manual_seed(seed)) / width**0.5
    if trained.shape != (width,):
        raise ModelError(
            f"image_newline of the projector's file has shape {tuple(trained.shape)}, but the language model is "
            f"{width} wide; use the language model that it was trained with."
        )
    return trained


def _check_adapter(source: Path, manifest: Manifest) -> None:
    """Raise ModelError if a folder's projector was trained on features of other settings than configured."""
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
    """Return the layout of a folder that describes its projector; None for a file or a folder without settings."""
    if not any((source / name).is_file() for name in ("llava.json", "config.json")):
        return None
    layout = read_layout(source)
    return layout if layout.settings else None
