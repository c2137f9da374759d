"""The description of a folder in the original layout: a whole model, a projector only, or a LoRA. No torch."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llava_ray.errors import ModelError
from llava_ray.model.formats.declared_sizes import read_config
from llava_ray.model.formats.known_templates import find_noted_version
from llava_ray.model.formats.layout import (
    ADAPTER_CONFIG,
    ADAPTER_FILES,
    CONFIG,
    EMBED_TOKENS,
    NON_LORA_FILE,
    ORIGINAL_PROJECTOR_FILE,
    TOKENIZER_FILES,
    Layout,
    LayoutKind,
    expect_any,
    expect_part,
    expect_projector,
)
from llava_ray.model.formats.names import IMAGE_NEWLINE
from llava_ray.model.formats.original.names import from_original
from llava_ray.model.formats.original.settings import is_original, original_language_config, read_original_settings
from llava_ray.model.tensors.tensor_files import WeightFiles, read_json_object, read_tensor_file, read_weights
from llava_ray.reading import is_file, is_folder

_WEIGHT_STEMS = ("model.safetensors", "pytorch_model.bin")


def read_original(folder: Path, config: Mapping[str, Any]) -> Layout:
    """Describe a folder whose config.json is the original's: a whole model, or a projector only."""
    is_whole = any(is_file(folder / f"{stem}{end}") for stem in _WEIGHT_STEMS for end in ("", ".index.json"))
    if is_whole or not is_file(folder / ORIGINAL_PROJECTOR_FILE):
        return _read_whole(folder, config)
    return _read_projector_only(folder, config)


def _read_whole(folder: Path, config: Mapping[str, Any]) -> Layout:
    weights = read_weights(folder).renamed(from_original)
    missing = list(weights.missing)
    expect_part(weights, "language_model", missing)
    expect_projector(weights, config, missing)
    if "unpad" in str(config.get("mm_patch_merge_type")) and weights.names and IMAGE_NEWLINE not in weights.names:
        missing.append("model.image_newline is in none of its weight files, though mm_patch_merge_type needs it.")
    expect_any(folder, TOKENIZER_FILES, "tokenizer", missing)
    return _original(folder, LayoutKind.ORIGINAL, config, weights, missing)


def _read_projector_only(folder: Path, config: Mapping[str, Any]) -> Layout:
    weights = WeightFiles.of(read_tensor_file(folder / ORIGINAL_PROJECTOR_FILE)).renamed(from_original)
    missing: list[str] = []
    expect_projector(weights, config, missing)
    _check_no_language_weights(folder / ORIGINAL_PROJECTOR_FILE, weights)
    return _original(folder, LayoutKind.ORIGINAL_PROJECTOR, config, weights, missing)


def read_lora(folder: Path) -> Layout:
    """Describe the original's LoRA folder."""
    missing: list[str] = []
    adapter, config = read_json_object(folder / ADAPTER_CONFIG), {}
    if is_file(folder / CONFIG):
        config = read_config(folder / CONFIG)
    else:
        missing.append(f"{CONFIG} is not there, which says what it was trained with.")
    if config and not is_original(config):
        raise ModelError(
            f"{folder / CONFIG} is beside {ADAPTER_CONFIG} but has no mm_vision_tower: it is not a LLaVA's."
        )
    expect_any(folder, ADAPTER_FILES, "adapter", missing)
    for name in ADAPTER_FILES:
        if is_file(folder / name):
            read_tensor_file(folder / name)  # PEFT will load it; this only rejects a file that is damaged or holds code
    weights = WeightFiles({}, frozenset())
    if is_file(folder / NON_LORA_FILE):
        weights = WeightFiles.of(read_tensor_file(folder / NON_LORA_FILE)).renamed(from_original)
        expect_projector(weights, config, missing)
        _check_no_language_weights(folder / NON_LORA_FILE, weights)
    else:
        missing.append(
            f"{NON_LORA_FILE}, which holds the projector, is not there. The original's checkpoints before the end of a "
            "LoRA run lack it: use the last one."
        )
    return _original(folder, LayoutKind.ORIGINAL_LORA, config, weights, missing, adapter.get("base_model_name_or_path"))


def _original(
    folder: Path,
    kind: LayoutKind,
    config: Mapping[str, Any],
    weights: WeightFiles,
    missing: list[str],
    base: str | None = None,
) -> Layout:
    settings = read_original_settings(config, str(folder / CONFIG)) if config else {}
    language_config = original_language_config(config) if config else None
    tower_folder = folder / "vision_tower"  # the place in our exports
    return Layout(
        folder,
        kind,
        config,
        settings | {"version": find_noted_version(config, language_config or {})},
        weights.tensors,
        weights.names,
        language_config,
        base=base or None,
        vision_tower=str(tower_folder) if is_folder(tower_folder) else config.get("mm_vision_tower"),
        missing=tuple(missing),
    )


def _check_no_language_weights(file: Path, weights: WeightFiles) -> None:
    """Raise ModelError if a file beside an adapter or projector holds trained weights of the language model."""
    others = [t for name, t in weights.tensors.items() if name.startswith("language_model.")]
    for tensor in others:
        if not tensor.name.endswith(f".{EMBED_TOKENS}"):
            raise ModelError(
                f"{file} holds weights of the language model itself, {tensor.name} the first, which no adapter or "
                "projector has. Merge it into its base with the program that wrote it."
            )
