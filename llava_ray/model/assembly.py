"""Assembly of models from their parts, and the layout of a bundle, their self-describing folder.

* ``llava.json``: what it is (``manifest.Manifest``)
* ``projector.safetensors``: under LLaVA's tensor names, without prefix; with ``image_newline`` where the model has it,
  and the ``embed_tokens.weight`` of new tokens where the language model is left out
* tokenizer files, with the chat template
* ``language_model/``: an ordinary transformers folder; may be left out and named in llava.json instead
* ``adapter/``: PEFT's files of a LoRA over a language model that is named
* ``vision_tower/``: the same, with preprocessor_config.json
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch

from llava_ray.config.lora import Quantization
from llava_ray.config.model import ModelConfig
from llava_ray.errors import ModelError
from llava_ray.model.blueprint import Blueprint, read_blueprint
from llava_ray.model.formats.layout import EMBED_TOKENS
from llava_ray.model.formats.manifest import (
    Manifest,
    ManifestPart,
    check_fingerprint,
    fingerprint_weights,
    library_versions,
)
from llava_ray.model.formats.part_sources import find_layout, find_vision_tower
from llava_ray.model.formats.projector_files import load_companions
from llava_ray.model.formats.sources import Source
from llava_ray.model.lora.adapters import has_adapter, load_adapter, merge_adapter
from llava_ray.model.network.llava import Llava
from llava_ray.model.network.tower import VisionTower
from llava_ray.model.parts import check_language_model, find_newline, load_language_model, load_projector, load_tower_of
from llava_ray.model.tensors.tensor_reading import read_tensors


@dataclass(frozen=True)
class LlavaParts(Blueprint):
    """A model with its weights. ``manifest`` describes it as a bundle that names its parts and holds none."""

    manifest: Manifest
    tower: VisionTower
    llava: Llava


def load_tower(config: ModelConfig, *, dtype: torch.dtype = torch.float32) -> VisionTower:
    """Load only the frozen vision tower of a model. Raises ModelError."""
    return load_tower_of(find_tower(config), dtype)


def find_tower(config: ModelConfig) -> Blueprint:
    """Return a model's blueprint with the weights of its tower at hand. Raises ModelError."""
    blueprint = read_blueprint(config, "square")  # the tower is the same for any aspect ratio
    if not blueprint.tower_source.tensors:  # a hub id, of which only small files have been fetched so far
        root, layout = find_layout(config.model_name_or_path, weights=blueprint.layout.has_vision_tower)
        tower = find_vision_tower(config, root, layout, weights=True)
        blueprint = replace(blueprint, tower_source=tower)
    return blueprint


def assemble(
    config: ModelConfig,
    image_aspect_ratio: str,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    model_max_length: int = 2048,
    language_model_context: AbstractContextManager[Any] | None = None,
    quantization: Quantization | None = None,
) -> LlavaParts:
    """Load a language model with its adapter, a tower and a projector, on the CPU.

    ``config.model_name_or_path`` is a model folder of any kind. A new projector depends on ``seed`` alone, so it is
    the same on every rank. ``language_model_context`` is entered only while the language model loads (ZeRO 3 partitions
    what is loaded inside it, which must not happen to the tower); ``quantization`` is for the language model alone.
    Raises ModelError where parts are missing or do not fit; nothing is loaded before all that can be told from the
    files' headers has been checked.
    """
    blueprint = read_blueprint(config, image_aspect_ratio, weights=True)
    check_length(blueprint, model_max_length)
    check_language_model(blueprint)
    manifest = _describe(blueprint, model_max_length)
    check_fingerprint(blueprint.language_source.folder, manifest.language_model.fingerprint, "language model")
    check_fingerprint(blueprint.tower_source.folder, manifest.vision_tower.fingerprint, "vision tower")
    tower = load_tower_of(blueprint, dtype)
    projector = load_projector(blueprint, manifest, seed).to(dtype)
    companions = read_tensors(blueprint.layout.companions)
    if config.pretrain_mm_mlp_adapter:
        companions |= load_companions(config.pretrain_mm_mlp_adapter)
    with language_model_context or nullcontext():
        model = load_language_model(blueprint, dtype, quantization, companions.get(EMBED_TOKENS))
        if blueprint.layout.adapter is not None:
            if blueprint.manifest and blueprint.manifest.adapter:
                check_fingerprint(blueprint.layout.adapter, blueprint.manifest.adapter, "adapter")
            load_adapter(model, blueprint.layout.adapter, base_fingerprint=manifest.language_model.fingerprint)
    newline = find_newline(blueprint, companions, seed)
    llava = Llava(projector, model, blueprint.mm_hidden_size, blueprint.image_tokens, newline.to(dtype))
    known = {**vars(blueprint), "manifest": manifest}
    return LlavaParts(**known, tower=tower, llava=llava)


def merge(parts: LlavaParts) -> LlavaParts:
    """Merge the adapter into the language model, in place; return parts whose manifest has none.

    Raises ModelError where there is no adapter, or where merging changes the logits by more than rounding.
    """
    language_model = parts.llava.language_model
    if not has_adapter(language_model):
        raise ModelError(f"{parts.bundle or parts.language_source.name} has no adapter: there is nothing to merge.")
    merge_adapter(language_model)
    return replace(parts, manifest=parts.manifest.model_copy(update={"adapter": None, "quantization": None}))


def check_length(blueprint: Blueprint, model_max_length: int) -> None:
    """Raise ModelError if samples may be longer than the language model has positions for."""
    positions = blueprint.language_config.get_text_config().to_dict().get("max_position_embeddings")
    if positions is not None and positions < model_max_length:
        raise ModelError(
            f"train.model_max_length is {model_max_length}, but {blueprint.language_source.name} was trained on "
            f"{positions} positions; set it to {positions} or less."
        )


def _describe(blueprint: Blueprint, model_max_length: int) -> Manifest:
    """Return the manifest of the model as a bundle that names its parts."""
    old = blueprint.manifest
    return Manifest(
        **dict(blueprint.geometry),
        version=blueprint.config.version,
        model_max_length=model_max_length,
        language_model=_named(blueprint.language_source, old.language_model if old else None),
        vision_tower=_named(blueprint.tower_source, old.vision_tower if old else None),
        adapter=old.adapter if old else None,
        quantization=old.quantization if old else None,
        libraries=library_versions(),
        training=old.training if old else {},
    )


def _named(source: Source, known: ManifestPart | None) -> ManifestPart:
    return ManifestPart(
        inside=False, base=source.name, fingerprint=known.fingerprint if known else fingerprint_weights(source.folder)
    )
