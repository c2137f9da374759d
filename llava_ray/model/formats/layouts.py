"""Detection of a model folder's kind by llava.json, config.json and tensor names, never by its name. No torch."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llava_ray.errors import ModelError
from llava_ray.invocation import command
from llava_ray.model.formats.bundle.read import read_bundle, read_checkpoint
from llava_ray.model.formats.declared_sizes import read_config
from llava_ray.model.formats.hub.read import read_hub
from llava_ray.model.formats.hub.settings import is_hub
from llava_ray.model.formats.layout import (
    ADAPTER_CONFIG,
    CONFIG,
    ORIGINAL_PROJECTOR_FILE,
    TRAINER_STATE,
    Layout,
    LayoutKind,
    is_timm,
)
from llava_ray.model.formats.manifest import MANIFEST_FILE, is_bundle
from llava_ray.model.formats.original.read import read_lora, read_original
from llava_ray.model.formats.original.settings import is_original
from llava_ray.model.tensors.tensor_files import read_weights
from llava_ray.reading import short_repr, wrap_errors

TOWER_TYPES = (
    "clip",
    "clip_vision_model",
    "dinov2",
    "dinov2_with_registers",
    "siglip",
    "siglip2",
    "siglip2_vision_model",
    "siglip_vision_model",
)


def read_layout(folder: Path) -> Layout:
    """Detect and describe a model folder. Raises ModelError for a folder that is not a model, or is damaged.

    Files that are merely absent (such as weights that were not downloaded) are listed in ``missing``: see
    ``check_whole``.
    """
    with wrap_errors(f"{folder}", "Copy the folder again.", says="cannot be read as a model"):
        return _read_layout(folder)


def _read_layout(folder: Path) -> Layout:
    if is_bundle(folder):
        return read_bundle(folder)
    if (folder / TRAINER_STATE).is_file() and is_bundle(folder / "model"):
        return read_checkpoint(folder)
    if (folder / ADAPTER_CONFIG).is_file():
        return read_lora(folder)
    if not (folder / CONFIG).is_file():
        raise ModelError(_unknown(folder))
    config = read_config(folder / CONFIG)
    if is_hub(config):
        return read_hub(folder, config)
    if is_original(config):
        return read_original(folder, config)
    model_type = config.get("model_type")
    is_tower = model_type in TOWER_TYPES or is_timm(config)
    if not is_tower and (model_type is None or str(model_type).startswith("llava")):
        raise ModelError(
            f"{folder / CONFIG}: model_type {short_repr(model_type)} is of no known layout. Known are the original's "
            "(llava, llava_llama, llava_mistral, with mm_vision_tower beside), transformers' llava and llava_next "
            "(with text_config and vision_config), llava_ray bundles and plain language models."
        )
    return _read_plain(folder, config, LayoutKind.VISION_TOWER if is_tower else LayoutKind.LANGUAGE_MODEL)


def _read_plain(folder: Path, config: Mapping[str, Any], kind: LayoutKind) -> Layout:
    is_tower = kind is LayoutKind.VISION_TOWER
    weights = read_weights(folder).below(kind.name.lower())
    return Layout(
        folder,
        kind,
        config,
        tensors=weights.tensors,
        names=weights.names,
        language_config=None if is_tower else config,
        tower_config=config if is_tower else None,
        missing=weights.missing,
    )


def _unknown(folder: Path) -> str:
    if (folder / ORIGINAL_PROJECTOR_FILE).is_file():
        return (
            f"{folder} holds {ORIGINAL_PROJECTOR_FILE} but no {CONFIG}, which says what it was trained with. Copy that "
            "too, or use the file as model.pretrain_mm_mlp_adapter."
        )
    if (folder / TRAINER_STATE).is_file():
        return f"{folder} is a training state without a model; the same {command('finetune')} command goes on from it."
    if is_bundle(folder / "model"):
        return f"{folder} is a run's folder; its model is {folder / 'model'}."
    return (
        f"{folder} is not a known kind of model folder: it has neither {MANIFEST_FILE}, {CONFIG} nor {ADAPTER_CONFIG}. "
        "Expected a llava_ray bundle, a LLaVA in the original or llava-hf layout, or a plain language model."
    )
