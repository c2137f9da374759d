"""Saving of a model in memory as a bundle: ``llava.json``, projector, tokenizer, and the selected parts."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from llava_ray.errors import BundleError
from llava_ray.model.assembly import LlavaParts
from llava_ray.model.formats.layout import ADAPTER_FOLDER, EMBED_TOKENS, PROJECTOR_FILE
from llava_ray.model.formats.manifest import ManifestPart, fingerprint_weights, library_versions, write_manifest
from llava_ray.model.formats.names import IMAGE_NEWLINE
from llava_ray.model.formats.saved_weights import replacing, save_weights
from llava_ray.model.formats.sources import LANGUAGE_MODEL, VISION_TOWER, Source
from llava_ray.model.formats.tower_loading import save_tower
from llava_ray.model.formats.vocabulary import image_token_ids
from llava_ray.model.lora.adapter_folding import fold_other_parts
from llava_ray.model.lora.adapters import adapter_layers, has_adapter, save_adapter
from llava_ray.model.network.quantization import find_quantization

Contents = Literal["all", "projector", "adapter"]


def save_bundle(
    folder: str | Path,
    parts: LlavaParts,
    tensors: Mapping[str, Tensor] | None = None,
    *,
    include: Contents | None = None,
    training: Mapping[str, Any] | None = None,
    place: str | Path | None = None,
) -> None:
    """Save a bundle atomically; an existing one is replaced.

    ``tensors`` are full tensors under Llava's names (``projector.0.weight``, ``language_model.lm_head.weight``), as
    gathered from a training engine; by default those of ``parts.llava``. With ``include="projector"`` the language
    model is named instead of copied, and so is a frozen tower; with "adapter" the adapter is saved beside the
    projector; by default the bundle holds all of the model, or the adapter if there is one. ``training`` is stored in
    the manifest; ``place`` is the bundle's final location, if not ``folder``. Raises BundleError if the folder cannot
    be written, is something else, or a tensor is missing.
    """
    model = parts.llava.language_model
    include = include or ("adapter" if has_adapter(model) else "all")
    _check_contents(model, include)
    tensors = fold_other_parts(parts.llava, parts.llava.state_dict() if tensors is None else tensors)
    with replacing(Path(folder)) as new:
        save_file(_projector_tensors(parts, tensors, embeddings=include != "all"), new / PROJECTOR_FILE)
        parts.tokenizer.save_pretrained(new)
        language, tower = parts.manifest.language_model, parts.manifest.vision_tower
        if include == "adapter":
            save_adapter(new / ADAPTER_FOLDER, model, language, _below("language_model.", tensors))
        if include == "all":
            save_weights(new / LANGUAGE_MODEL, model, _below("language_model.", tensors))
            language = _held(parts.language_source, new / LANGUAGE_MODEL)
        trained = _below("vision_tower.", tensors)
        if include == "all" or trained:
            # ``trained`` is the whole tower except the blocks that were truncated.
            adapted = tuple(name.removeprefix("vision_tower.") + "." for name in adapter_layers(parts.llava))
            own = {name: t for name, t in parts.tower.full_state_dict().items() if not name.startswith(adapted)}
            save_tower(new / VISION_TOWER, parts.tower, own | trained, parts.image_processor)
            tower = _held(parts.tower_source, new / VISION_TOWER)
        manifest = parts.manifest.model_copy(
            update={
                "language_model": language,
                "vision_tower": tower,
                "adapter": fingerprint_weights(new / ADAPTER_FOLDER) if include == "adapter" else None,
                "quantization": find_quantization(model),
                "libraries": library_versions(),
                "training": dict(training or {}),
            }
        )
        write_manifest(new, manifest, place or folder)


def _check_contents(language_model: PreTrainedModel, include: Contents) -> None:
    """Raise BundleError if a bundle of these parts would not be the model in memory."""
    if (include == "adapter") != has_adapter(language_model):
        raise BundleError(
            "the language model has an adapter, which such a bundle would lose; merge it first, or write the adapter."
            if include != "adapter"
            else "the language model has no adapter to write; write all of it."
        )
    if include == "all" and find_quantization(language_model):
        raise BundleError(
            "the language model is quantised, and a bundle holds unquantised weights; load it with bits = 16."
        )


def names_beside(parts: LlavaParts) -> tuple[str, ...]:
    """Return the name prefixes of all tensors of a bundle without its language model."""
    embeddings = (parts.llava.embeddings_name,) if image_token_ids(parts.tokenizer) else ()
    return "projector.", IMAGE_NEWLINE, "vision_tower.", *embeddings


def _projector_tensors(parts: LlavaParts, tensors: Mapping[str, Tensor], *, embeddings: bool) -> dict[str, Tensor]:
    """Return the tensors of PROJECTOR_FILE: projector, image_newline and, with ``embeddings``, those of new tokens."""
    found = _below("projector.", tensors)
    if IMAGE_NEWLINE in tensors:
        found[IMAGE_NEWLINE] = tensors[IMAGE_NEWLINE].detach().contiguous()
    ids = image_token_ids(parts.tokenizer)
    if embeddings and ids:
        found[EMBED_TOKENS] = tensors[parts.llava.embeddings_name].detach()[list(ids)]
    return found


def _held(source: Source, folder: Path) -> ManifestPart:
    return ManifestPart(inside=True, base=source.origin, fingerprint=fingerprint_weights(folder))


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): tensor.detach().contiguous()
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }
