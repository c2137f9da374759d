"""``load_pretrained_model``: one function for all layouts of LLaVA models."""

import logging
from pathlib import Path
from typing import Any

import torch

from llava_ray.chat.conversation import IMAGE_TOKEN
from llava_ray.config.lora import Bits
from llava_ray.config.model import ModelConfig
from llava_ray.errors import ConfigError, ModelError
from llava_ray.model.assembly import LlavaParts, assemble
from llava_ray.model.blueprint import Blueprint, read_blueprint
from llava_ray.model.formats.layout import Layout, LayoutKind
from llava_ray.model.formats.noted_settings import OUR_KEY
from llava_ray.model.formats.part_sources import find_layout
from llava_ray.model.formats.stated_settings import find_length, find_version
from llava_ray.model.formats.token_rows import image_token_note
from llava_ray.model.network.quantization import choose_quantization
from llava_ray.reading import short_repr

logger = logging.getLogger(__name__)


# Values that switch a setting off, so that an unknown setting may be ignored.
_NOTHING = (None, False, "flat")


def load_pretrained_model(
    model_path: str | Path,
    model_base: str | Path | None = None,
    *,
    vision_tower: str | Path | None = None,
    version: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    bits: Bits | None = None,
) -> LlavaParts:
    """Load a LLaVA in evaluation mode on ``device``; LLaVA's own function name.

    ``model_path`` is a folder or hub id: a llava_ray bundle, a published model in the original or the llava-hf layout,
    a LoRA or projector-only folder over ``model_base``, or a plain language model (its projector is then new and
    untrained). Its kind is detected from its config.json, llava.json and tensor names, never from its name.
    ``model_base``, ``vision_tower`` and ``version`` (the template) supply what a folder does not state, or the new
    place of a part. ``bits`` 8 or 4 quantises the language model as it is loaded; by default a bundle's is loaded as
    it was trained. An adapter is not merged.

    Raises ModelError (BundleError for a bundle whose parts have other fingerprints) that names file and key, before any
    weights are loaded where the files' headers suffice.
    """
    _, layout = find_layout(str(model_path), weights=True)
    config = pretrained_config(layout, model_path, model_base, vision_tower, version)
    parts = assemble(
        config,
        aspect_ratio(layout),
        dtype=dtype,
        model_max_length=find_length(layout),
        quantization=choose_quantization(bits, layout.manifest.quantization if layout.manifest else None),
    )
    for note in _notes_of(parts):
        logger.warning(note)
    parts.tower.to(device)
    parts.llava.to(device).eval()
    return parts


def read_pretrained_blueprint(
    model_path: str | Path,
    model_base: str | Path | None = None,
    *,
    vision_tower: str | Path | None = None,
    version: str | None = None,
) -> Blueprint:
    """Read the blueprint of the model that ``load_pretrained_model`` would load. Raises ModelError."""
    _, layout = find_layout(str(model_path), weights=False)
    config = pretrained_config(layout, model_path, model_base, vision_tower, version)
    return read_blueprint(config, aspect_ratio(layout))


def pretrained_config(
    layout: Layout,
    model_path: str | Path,
    model_base: str | Path | None = None,
    vision_tower: str | Path | None = None,
    version: str | None = None,
) -> ModelConfig:
    """Build the model config that matches a model folder's own settings. Raises ModelError."""
    overrides = {"model_base": model_base, "vision_tower": vision_tower}
    values: dict[str, Any] = {key: str(value) for key, value in overrides.items() if value is not None}
    values |= {"model_name_or_path": str(model_path), "version": find_version(layout, version)}
    for key, value in layout.settings.items():
        if value == ():  # not set
            continue
        if key in ModelConfig.model_fields and key != "version":
            values[key] = value
        elif key.startswith(("mm_", "s2")) and key != "mm_hidden_size" and value not in _NOTHING:
            raise ModelError(f"{layout.folder}: {key} is {short_repr(value)}, which is not supported here.")
    try:
        return ModelConfig.parsed(values)
    except ConfigError as error:
        raise ModelError(f"the config of {layout.folder} ({layout.kind}) is not supported: {error}") from error


def describe_model(blueprint: Blueprint) -> str:
    """Describe a model in one line: its kind, its template and the parts outside the folder."""
    layout, version = blueprint.layout, blueprint.config.version
    parts = [f"language model {blueprint.language_source.name}"] if not layout.has_language_model else []
    parts += [f"tower {blueprint.tower_source.name}"] if not layout.has_vision_tower else []
    parts += ["adapter"] if layout.adapter else []
    parts += ["its projector is new and untrained"] if not layout.settings else []
    if version != layout.settings.get("version"):
        origin = "as given"
    elif layout.manifest is not None or OUR_KEY in layout.config:
        origin = "its own"
    else:
        origin = "that of published models like it"
    facts = [f"{blueprint.config.model_name_or_path}: {layout.kind}, template {version!r} ({origin})", *parts]
    return "; ".join([", ".join(facts), *_notes_of(blueprint)])


def _notes_of(blueprint: Blueprint) -> tuple[str, ...]:
    """Return notes for the user on a model, one sentence each."""
    layout = blueprint.layout
    token = blueprint.tokenizer.get_added_vocab().get(IMAGE_TOKEN)
    note = image_token_note(layout.config, token) if layout.kind is LayoutKind.HUB else None
    return (*layout.notes, note) if note else layout.notes


def aspect_ratio(layout: Layout) -> str:
    """Return a model's image_aspect_ratio; "square" where it is not recorded."""
    return str(layout.settings.get("image_aspect_ratio", "square"))
