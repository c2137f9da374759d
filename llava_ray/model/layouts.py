"""What a model folder is: decided by llava.json, config.json and tensor names, never by what it is called. No torch."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from llava_ray.errors import ModelError
from llava_ray.model.declared_sizes import read_config
from llava_ray.model.layout import (
    ADAPTER_CONFIG,
    CONFIG,
    EMBED_TOKENS,
    ORIGINAL_PROJECTOR_FILE,
    PROJECTOR_FILE,
    TOKENIZER_FILES,
    Kind,
    Layout,
    expect_any,
)
from llava_ray.model.manifest import MANIFEST_FILE, is_bundle, read_manifest
from llava_ray.model.published_layouts import read_hub, read_lora, read_original
from llava_ray.model.published_names import IMAGE_NEWLINE
from llava_ray.model.published_settings import is_hub, is_original
from llava_ray.model.tensor_files import Weights, read_tensor_file, read_weights
from llava_ray.reading import in_words, shown

TRAINER_STATE, COMPLETE = "trainer_state.json", "COMPLETE"
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
    """Find out what ``folder`` is. Raises ModelError for a folder that is no model, or whose files are damaged.

    What is merely not there (weights that were not downloaded, say) is listed in ``missing``: see ``check_whole``.
    """
    with in_words(f"{folder}", "Copy the folder again.", says="cannot be read as a model"):
        return _read_layout(folder)


def _read_layout(folder: Path) -> Layout:
    if is_bundle(folder):
        return _read_bundle(folder)
    if (folder / TRAINER_STATE).is_file() and is_bundle(folder / "model"):
        return _read_checkpoint(folder)
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
    if model_type is None or str(model_type).startswith("llava"):
        raise ModelError(
            f"{folder / CONFIG}: model_type {shown(model_type)} is of no known layout. Known are the original's "
            "(llava, llava_llama, llava_mistral, with mm_vision_tower beside), transformers' llava and llava_next "
            "(with text_config and vision_config), llava_ray bundles and plain language models."
        )
    return _read_plain(folder, config, Kind.VISION_TOWER if model_type in TOWER_TYPES else Kind.LANGUAGE_MODEL)


def _bundle_name(own: str) -> str:
    """Return the canonical name of a tensor in a bundle's projector file."""
    if own == EMBED_TOKENS:
        return f"language_model.model.{EMBED_TOKENS}"
    return own if own == IMAGE_NEWLINE else f"projector.{own}"


def _read_bundle(folder: Path) -> Layout:
    manifest = read_manifest(folder)
    missing: list[str] = []
    weights = Weights({}, frozenset())
    if (folder / PROJECTOR_FILE).is_file():
        beside = Weights.of(read_tensor_file(folder / PROJECTOR_FILE))
        weights = beside.renamed(_bundle_name)
    elif manifest.mm_projector_type != "identity":
        missing.append(f"{PROJECTOR_FILE} is not there; copy the bundle again.")
    configs: dict[str, Mapping[str, Any]] = {}
    parts = {"language_model": manifest.language_model, "vision_tower": manifest.vision_tower}
    for name in [name for name, part in parts.items() if part.inside]:
        inside = read_weights(folder / name).below(name)
        weights = Weights(weights.tensors | inside.tensors, weights.names | inside.names)
        if (folder / name / CONFIG).is_file():
            configs[name] = read_config(folder / name / CONFIG)
        else:
            missing.append(f"{name}/{CONFIG} is not there; copy the bundle again.")
        missing += [f"{name}/: {what}" for what in inside.missing]
    expect_any(folder, TOKENIZER_FILES, "tokenizer", missing)
    return Layout(
        folder,
        Kind.BUNDLE,
        settings=manifest.model_dump(exclude={*parts, "libraries", "training"}),
        tensors=weights.tensors,
        names=weights.names,
        language_config=configs.get("language_model"),
        tower_config=configs.get("vision_tower"),
        base=None if manifest.language_model.inside else manifest.language_model.base,
        vision_tower=None if manifest.vision_tower.inside else manifest.vision_tower.base,
        manifest=manifest,
        missing=tuple(missing),
    )


def _read_checkpoint(folder: Path) -> Layout:
    """Read the model of a run's checkpoint, which is a bundle."""
    layout = _read_bundle(folder / "model")
    if (folder / COMPLETE).is_file():
        return layout
    half = f"{COMPLETE} is not in {folder}: the checkpoint was never finished. Use an earlier one."
    return replace(layout, missing=(half, *layout.missing))


def _read_plain(folder: Path, config: Mapping[str, Any], kind: Kind) -> Layout:
    is_tower = kind is Kind.VISION_TOWER
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
        return f"{folder} is a training state without a model; the same finetune.py command goes on from it."
    if is_bundle(folder / "model"):
        return f"{folder} is a run's folder; its model is {folder / 'model'}."
    return (
        f"{folder} is no model that is known here: it has neither {MANIFEST_FILE}, {CONFIG} nor {ADAPTER_CONFIG}. "
        "Expected a llava_ray bundle, a LLaVA in the original or llava-hf layout, or a plain language model."
    )
