"""The description of a llava_ray bundle, or of the one inside a training checkpoint. No torch."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from llava_ray.model.formats.bundle.names import from_bundle
from llava_ray.model.formats.declared_sizes import read_config
from llava_ray.model.formats.layout import (
    COMPLETE,
    CONFIG,
    PROJECTOR_FILE,
    TOKENIZER_FILES,
    Layout,
    LayoutKind,
    expect_any,
)
from llava_ray.model.formats.manifest import read_manifest
from llava_ray.model.tensors.tensor_files import WeightFiles, read_tensor_file, read_weights


def read_bundle(folder: Path) -> Layout:
    """Describe a bundle. Raises BundleError for a manifest that cannot be read."""
    manifest = read_manifest(folder)
    missing: list[str] = []
    weights = WeightFiles({}, frozenset())
    if (folder / PROJECTOR_FILE).is_file():
        beside = WeightFiles.of(read_tensor_file(folder / PROJECTOR_FILE))
        weights = beside.renamed(from_bundle)
    elif manifest.mm_projector_type != "identity":
        missing.append(f"{PROJECTOR_FILE} is not there; copy the bundle again.")
    configs: dict[str, Mapping[str, Any]] = {}
    parts = {"language_model": manifest.language_model, "vision_tower": manifest.vision_tower}
    for name in [name for name, part in parts.items() if part.inside]:
        inside = read_weights(folder / name).below(name)
        weights = WeightFiles(weights.tensors | inside.tensors, weights.names | inside.names)
        if (folder / name / CONFIG).is_file():
            configs[name] = read_config(folder / name / CONFIG)
        else:
            missing.append(f"{name}/{CONFIG} is not there; copy the bundle again.")
        missing += [f"{name}/: {what}" for what in inside.missing]
    expect_any(folder, TOKENIZER_FILES, "tokenizer", missing)
    return Layout(
        folder,
        LayoutKind.BUNDLE,
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


def read_checkpoint(folder: Path) -> Layout:
    """Describe the model of a run's checkpoint, which is a bundle."""
    layout = read_bundle(folder / "model")
    if (folder / COMPLETE).is_file():
        return layout
    half = f"{COMPLETE} is not in {folder}: the checkpoint was never finished. Use an earlier one."
    return replace(layout, missing=(half, *layout.missing))
