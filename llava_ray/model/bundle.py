"""Models put together from their parts, and kept in one self-describing folder.

* ``llava.json``: what it is (``manifest.Manifest``)
* ``projector.safetensors``: under LLaVA's tensor names, without prefix; with ``image_newline`` where the model has it,
  and the ``embed_tokens.weight`` of new tokens where the language model is left out
* tokenizer files, with the chat template
* ``language_model/``: an ordinary transformers folder; may be left out and named in llava.json instead
* ``adapter/``: PEFT's files of a LoRA over a language model that is named
* ``vision_tower/``: the same, with preprocessor_config.json
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from llava_ray.config.lora import Quantization
from llava_ray.config.sections import ModelConfig
from llava_ray.errors import BundleError, ModelError
from llava_ray.model.adapter_folding import fold_other_parts
from llava_ray.model.adapters import adapter_layers, has_adapter, load_adapter, save_adapter
from llava_ray.model.blueprint import (
    LANGUAGE_MODEL,
    VISION_TOWER,
    Blueprint,
    find_layout,
    find_vision_tower,
    read_blueprint,
)
from llava_ray.model.layout import ADAPTER_FOLDER, EMBED_TOKENS, PROJECTOR_FILE
from llava_ray.model.llava import Llava
from llava_ray.model.manifest import (
    Manifest,
    Part,
    check_fingerprint,
    fingerprint,
    library_versions,
    write_manifest,
)
from llava_ray.model.parts import check_language_model, find_newline, load_language_model, load_projector, load_tower_of
from llava_ray.model.projector import load_companions
from llava_ray.model.published_names import IMAGE_NEWLINE
from llava_ray.model.quantization import find_quantization
from llava_ray.model.sources import Source
from llava_ray.model.tensor_reading import read_tensors
from llava_ray.model.tower import VisionTower
from llava_ray.model.vocabulary import image_token_ids
from llava_ray.model.weights import replacing, save_weights

Contents = Literal["all", "projector", "adapter"]


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
    """Load a language model, with the adapter that lies over it, and a tower with a projector, on the CPU.

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


def save_bundle(
    folder: str | Path,
    parts: LlavaParts,
    tensors: Mapping[str, Tensor] | None = None,
    *,
    include: Contents | None = None,
    training: Mapping[str, Any] | None = None,
    place: str | Path | None = None,
) -> None:
    """Write a bundle, whole or not at all; one that is already there is replaced.

    ``tensors`` are full tensors under Llava's names (``projector.0.weight``, ``language_model.lm_head.weight``), as
    gathered from a training engine; by default those of ``parts.llava``. With ``include="projector"`` the language
    model is named instead of copied, and so is a tower that has not learnt; with "adapter" the adapter is written
    beside the projector; by default the bundle holds all of the model, or the adapter if there is one. ``training`` is
    kept in the manifest; ``place`` says where the bundle will lie, if not in ``folder``. Raises
    BundleError if the folder cannot be written, is something else, or a tensor is missing.
    """
    model = parts.llava.language_model
    include = include or ("adapter" if has_adapter(model) else "all")
    check_contents(model, include)
    tensors = fold_other_parts(parts.llava, parts.llava.state_dict() if tensors is None else tensors)
    with replacing(Path(folder)) as new:
        save_file(projector_tensors(parts, tensors, embeddings=include != "all"), new / PROJECTOR_FILE)
        parts.tokenizer.save_pretrained(new)
        language, tower = parts.manifest.language_model, parts.manifest.vision_tower
        if include == "adapter":
            save_adapter(new / ADAPTER_FOLDER, model, language, _below("language_model.", tensors))
        if include == "all":
            save_weights(new / LANGUAGE_MODEL, model, _below("language_model.", tensors))
            language = _held(parts.language_source, new / LANGUAGE_MODEL)
        learnt = _below("vision_tower.", tensors)
        if include == "all" or learnt:
            # What has learnt is all of the tower but the blocks that were set aside.
            adapted = tuple(name.removeprefix("vision_tower.") + "." for name in adapter_layers(parts.llava))
            own = {name: t for name, t in parts.tower.full_state_dict().items() if not name.startswith(adapted)}
            save_weights(new / VISION_TOWER, parts.tower.backbone, own | learnt)
            parts.image_processor.save_pretrained(new / VISION_TOWER)
            tower = _held(parts.tower_source, new / VISION_TOWER)
        manifest = parts.manifest.model_copy(
            update={
                "language_model": language,
                "vision_tower": tower,
                "adapter": fingerprint(new / ADAPTER_FOLDER) if include == "adapter" else None,
                "quantization": find_quantization(model),
                "libraries": library_versions(),
                "training": dict(training or {}),
            }
        )
        write_manifest(new, manifest, place or folder)


def check_contents(language_model: PreTrainedModel, include: Contents) -> None:
    """Raise BundleError if a bundle of these parts would not be the model in memory."""
    if (include == "adapter") != has_adapter(language_model):
        raise BundleError(
            "the language model has an adapter, which such a bundle would lose; merge it first, or write the adapter."
            if include != "adapter"
            else "the language model has no adapter to write; write all of it."
        )
    if include == "all" and find_quantization(language_model):
        raise BundleError(
            "the language model is quantised, and a bundle holds weights as they are; load it with bits = 16."
        )


def names_beside(parts: LlavaParts) -> tuple[str, ...]:
    """Return how the names begin of all tensors that a bundle needs which leaves the language model out."""
    embeddings = (parts.llava.embeddings_name,) if image_token_ids(parts.tokenizer) else ()
    return "projector.", IMAGE_NEWLINE, "vision_tower.", *embeddings


def projector_tensors(parts: LlavaParts, tensors: Mapping[str, Tensor], *, embeddings: bool) -> dict[str, Tensor]:
    """Return what belongs into PROJECTOR_FILE: projector, image_newline, and if asked the new tokens' embeddings."""
    found = _below("projector.", tensors)
    if IMAGE_NEWLINE in tensors:
        found[IMAGE_NEWLINE] = tensors[IMAGE_NEWLINE].detach().contiguous()
    ids = image_token_ids(parts.tokenizer)
    if embeddings and ids:
        found[EMBED_TOKENS] = tensors[parts.llava.embeddings_name].detach()[list(ids)]
    return found


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
    config, old = blueprint.config, blueprint.manifest
    return Manifest(
        version=config.version,
        mm_projector_type=config.mm_projector_type,
        mm_hidden_size=blueprint.mm_hidden_size,
        hidden_size=blueprint.hidden_size,
        mm_vision_select_layer=config.mm_vision_select_layer,
        mm_vision_select_feature=config.mm_vision_select_feature,
        s2_scales=blueprint.s2_scales,
        image_aspect_ratio=blueprint.image_spec.aspect_ratio,
        image_grid_pinpoints=blueprint.image_spec.grid_pinpoints,
        mm_patch_merge_type=config.mm_patch_merge_type,
        mm_use_im_start_end=config.mm_use_im_start_end,
        mm_use_im_patch_token=config.mm_use_im_patch_token,
        model_max_length=model_max_length,
        language_model=_named(blueprint.language_source, old.language_model if old else None),
        vision_tower=_named(blueprint.tower_source, old.vision_tower if old else None),
        adapter=old.adapter if old else None,
        quantization=old.quantization if old else None,
        libraries=library_versions(),
        training=old.training if old else {},
    )


def _named(source: Source, known: Part | None) -> Part:
    return Part(inside=False, base=source.name, fingerprint=known.fingerprint if known else fingerprint(source.folder))


def _held(source: Source, folder: Path) -> Part:
    return Part(inside=True, base=source.origin, fingerprint=fingerprint(folder))


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): tensor.detach().contiguous()
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }
