"""The description of a folder in the layout of transformers' LLaVA classes (llava-hf). No torch."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llava_ray.model.formats.hub.names import from_hub
from llava_ray.model.formats.hub.settings import hub_language_config, hub_tower_config, noted_hub_settings
from llava_ray.model.formats.known_templates import find_noted_version
from llava_ray.model.formats.layout import CONFIG, TOKENIZER_FILES, Layout, LayoutKind, expect_any, expect_part
from llava_ray.model.formats.names import IMAGE_NEWLINE
from llava_ray.model.formats.noted_settings import OUR_KEY, describe_change
from llava_ray.model.tensors.tensor_files import read_json_object, read_weights
from llava_ray.reading import is_file

PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")


def read_hub(folder: Path, config: Mapping[str, Any]) -> Layout:
    """Describe a folder in the layout of transformers' LLaVA classes."""
    weights = read_weights(folder).renamed(from_hub)
    missing = list(weights.missing)
    expect_part(weights, "language_model", missing)
    expect_part(weights, "vision_tower", missing)
    expect_part(weights, "projector", missing)
    if config["model_type"] == "llava_next" and weights.names and IMAGE_NEWLINE not in weights.names:
        missing.append("image_newline is in none of its weight files.")
    expect_any(folder, TOKENIZER_FILES, "tokenizer", missing)
    expect_any(folder, PROCESSOR_FILES, "image processor", missing)
    language_config = hub_language_config(config)
    settings, notes = noted_hub_settings(config, str(folder / CONFIG))
    shapes = {False: "square", True: "pad"}
    if settings.get("image_aspect_ratio") in ("square", "pad") and (found := shapes.get(_pads(folder))):  # type: ignore[arg-type]
        if OUR_KEY in config and settings["image_aspect_ratio"] != found:
            notes += (describe_change("do_pad of the image processor", found == "pad", settings["image_aspect_ratio"]),)
        settings["image_aspect_ratio"] = found
    return Layout(
        folder,
        LayoutKind.HUB,
        config,
        settings | {"version": find_noted_version(config, language_config)},
        weights.tensors,
        weights.names,
        language_config,
        hub_tower_config(config),
        missing=tuple(missing),
        notes=tuple(f"{folder / CONFIG}: {note}" for note in notes),
    )


def _pads(folder: Path) -> bool | None:
    """Return whether the image processor pads images to squares before resizing; None where it does not state it."""
    files = [read_json_object(folder / name) for name in PROCESSOR_FILES if is_file(folder / name)]
    settings = [found.get("image_processor", found) for found in files]
    stated = [found["do_pad"] for found in settings if isinstance(found, dict) and found.get("do_pad") is not None]
    return any(stated) if stated else None
