"""The layouts that LLaVAs are published in: the original's three kinds, and that of transformers. No torch."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llava_ray.errors import ModelError
from llava_ray.model.declared_sizes import read_config
from llava_ray.model.hub_manifest import OUR_KEY, changed
from llava_ray.model.layout import (
    ADAPTER_CONFIG,
    ADAPTER_FILES,
    CONFIG,
    EMBED_TOKENS,
    NON_LORA_FILE,
    ORIGINAL_PROJECTOR_FILE,
    TOKENIZER_FILES,
    Kind,
    Layout,
    expect_any,
)
from llava_ray.model.published_names import IMAGE_NEWLINE, PEFT_PREFIX
from llava_ray.model.published_settings import (
    find_version,
    hub_language_config,
    hub_tower_config,
    is_original,
    noted_hub_settings,
    original_language_config,
    original_settings,
)
from llava_ray.model.tensor_files import Weights, read_json, read_tensor_file, read_weights
from llava_ray.reading import is_file, is_folder

PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
WEIGHT_STEMS = ("model.safetensors", "pytorch_model.bin")


def original_name(name: str) -> str:
    """Return the canonical name of a tensor in the original layout, with or without PEFT's prefix."""
    own = name.removeprefix(PEFT_PREFIX)
    if projector := re.search(r"(?:^|\.)mm_projector\.(.+)", own):
        return f"projector.{projector[1]}"
    if own.startswith("model.vision_tower.vision_tower."):
        return f"vision_tower.{own.removeprefix('model.vision_tower.vision_tower.')}"
    return IMAGE_NEWLINE if own == "model.image_newline" else f"language_model.{own}"


def hub_name(name: str) -> str:
    """Return the canonical name of a tensor in transformers' LLaVA layout, as older or newer versions write it."""
    own = name.removeprefix("model.")
    if projector := re.fullmatch(r"multi_modal_projector\.linear_([12])\.(weight|bias)", own):
        return f"projector.{2 * int(projector[1]) - 2}.{projector[2]}"
    if own.startswith("vision_tower.") or own == IMAGE_NEWLINE:
        return own
    if name.startswith("model.language_model."):
        return f"language_model.model.{name.removeprefix('model.language_model.')}"
    return name if name.startswith("language_model.") else f"language_model.{name}"


def read_original(folder: Path, config: Mapping[str, Any]) -> Layout:
    """Describe a folder whose config.json is the original's: a whole model, or a projector only."""
    is_whole = any(is_file(folder / f"{stem}{end}") for stem in WEIGHT_STEMS for end in ("", ".index.json"))
    if is_whole or not is_file(folder / ORIGINAL_PROJECTOR_FILE):
        return _read_whole(folder, config)
    return _read_projector_only(folder, config)


def _read_whole(folder: Path, config: Mapping[str, Any]) -> Layout:
    weights = read_weights(folder).renamed(original_name)
    missing = list(weights.missing)
    _expect_part(weights, "language_model", missing)
    _expect_projector(weights, config, missing)
    if "unpad" in str(config.get("mm_patch_merge_type")) and weights.names and IMAGE_NEWLINE not in weights.names:
        missing.append("model.image_newline is in none of its weight files, though mm_patch_merge_type needs it.")
    expect_any(folder, TOKENIZER_FILES, "tokenizer", missing)
    return _original(folder, Kind.ORIGINAL, config, weights, missing)


def _read_projector_only(folder: Path, config: Mapping[str, Any]) -> Layout:
    weights = Weights.of(read_tensor_file(folder / ORIGINAL_PROJECTOR_FILE)).renamed(original_name)
    missing: list[str] = []
    _expect_projector(weights, config, missing)
    _refuse_others(folder / ORIGINAL_PROJECTOR_FILE, weights)
    return _original(folder, Kind.ORIGINAL_PROJECTOR, config, weights, missing)


def read_lora(folder: Path) -> Layout:
    """Describe the original's LoRA folder."""
    missing: list[str] = []
    adapter, config = read_json(folder / ADAPTER_CONFIG), {}
    if is_file(folder / CONFIG):
        config = read_config(folder / CONFIG)
    else:
        missing.append(f"{CONFIG} is not there, which says what it was trained with.")
    if config and not is_original(config):
        raise ModelError(f"{folder / CONFIG} lies beside {ADAPTER_CONFIG} but has no mm_vision_tower: not a LLaVA's.")
    expect_any(folder, ADAPTER_FILES, "adapter", missing)
    for name in ADAPTER_FILES:
        if is_file(folder / name):
            read_tensor_file(folder / name)  # PEFT will read it, this only refuses what is damaged or holds code
    weights = Weights({}, frozenset())
    if is_file(folder / NON_LORA_FILE):
        weights = Weights.of(read_tensor_file(folder / NON_LORA_FILE)).renamed(original_name)
        _expect_projector(weights, config, missing)
        _refuse_others(folder / NON_LORA_FILE, weights)
    else:
        missing.append(
            f"{NON_LORA_FILE}, which holds the projector, is not there. The original's checkpoints before the end of a "
            "LoRA run lack it: use the last one."
        )
    return _original(folder, Kind.ORIGINAL_LORA, config, weights, missing, adapter.get("base_model_name_or_path"))


def _original(
    folder: Path,
    kind: Kind,
    config: Mapping[str, Any],
    weights: Weights,
    missing: list[str],
    base: str | None = None,
) -> Layout:
    settings = original_settings(config, str(folder / CONFIG)) if config else {}
    language_config = original_language_config(config) if config else None
    tower_folder = folder / "vision_tower"  # where an export of ours puts it
    return Layout(
        folder,
        kind,
        config,
        settings | {"version": find_version(config, language_config or {})},
        weights.tensors,
        weights.names,
        language_config,
        base=base or None,
        vision_tower=str(tower_folder) if is_folder(tower_folder) else config.get("mm_vision_tower"),
        missing=tuple(missing),
    )


def read_hub(folder: Path, config: Mapping[str, Any]) -> Layout:
    """Describe a folder in the layout of transformers' LLaVA classes."""
    weights = read_weights(folder).renamed(hub_name)
    missing = list(weights.missing)
    _expect_part(weights, "language_model", missing)
    _expect_part(weights, "vision_tower", missing)
    _expect_part(weights, "projector", missing)
    if config["model_type"] == "llava_next" and weights.names and IMAGE_NEWLINE not in weights.names:
        missing.append("image_newline is in none of its weight files.")
    expect_any(folder, TOKENIZER_FILES, "tokenizer", missing)
    expect_any(folder, PROCESSOR_FILES, "image processor", missing)
    language_config = hub_language_config(config)
    settings, notes = noted_hub_settings(config, str(folder / CONFIG))
    shapes = {False: "square", True: "pad"}
    if settings.get("image_aspect_ratio") in ("square", "pad") and (found := shapes.get(_pads(folder))):  # type: ignore[arg-type]
        if OUR_KEY in config and settings["image_aspect_ratio"] != found:
            notes += (changed("do_pad of the image processor", found == "pad", settings["image_aspect_ratio"]),)
        settings["image_aspect_ratio"] = found
    return Layout(
        folder,
        Kind.HUB,
        config,
        settings | {"version": find_version(config, language_config)},
        weights.tensors,
        weights.names,
        language_config,
        hub_tower_config(config),
        missing=tuple(missing),
        notes=tuple(f"{folder / CONFIG}: {note}" for note in notes),
    )


def _refuse_others(file: Path, weights: Weights) -> None:
    """Raise ModelError if a file beside an adapter or projector holds language model weights that learnt too."""
    others = [t for name, t in weights.tensors.items() if name.startswith("language_model.")]
    for tensor in others:
        if not tensor.name.endswith(f".{EMBED_TOKENS}"):
            raise ModelError(
                f"{file} holds weights of the language model itself, {tensor.name} the first, which no adapter or "
                "projector has. Merge it into its base with the program that wrote it."
            )


def _pads(folder: Path) -> bool | None:
    """Tell whether the image processor makes images square before it resizes them; None where it does not say."""
    files = [read_json(folder / name) for name in PROCESSOR_FILES if is_file(folder / name)]
    settings = [found.get("image_processor", found) for found in files]
    told = [found["do_pad"] for found in settings if isinstance(found, dict) and found.get("do_pad") is not None]
    return any(told) if told else None


def _expect_part(weights: Weights, part: str, missing: list[str]) -> None:
    if weights.names and not any(name.startswith(f"{part}.") for name in weights.names):
        missing.append(f"no tensor of the {part.replace('_', ' ')} is in its weight files.")


def _expect_projector(weights: Weights, config: Mapping[str, Any], missing: list[str]) -> None:
    if config.get("mm_projector_type") != "identity":
        _expect_part(weights, "projector", missing)
