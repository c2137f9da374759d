"""Search for a model's language model and vision tower: inside its folder, or where it or the settings name them."""

from pathlib import Path

from llava_ray.config.model import ModelConfig
from llava_ray.errors import ModelError
from llava_ray.model.formats.layout import Layout, LayoutKind
from llava_ray.model.formats.layouts import read_layout
from llava_ray.model.formats.sources import (
    LANGUAGE_MODEL,
    VISION_TOWER,
    PartName,
    Source,
    find_part,
    find_source,
    make_config,
    part_of,
    read_layout_of,
)
from llava_ray.reading import is_folder

# Keys that must agree between a base's config and the config that an adapter or projector was trained with.
_SHAPE_KEYS = (
    "model_type",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "max_position_embeddings",
    "rms_norm_eps",
)


def find_layout(name: str, *, weights: bool, offline: bool = False) -> tuple[Source, Layout]:
    """Find a model folder or hub id and what it is. Raises ModelError."""
    root = find_source(name, "language model", weights=weights, offline=offline)
    layout = read_layout_of(root)
    is_hub_id = root.name != str(root.folder)
    if layout.kind is LayoutKind.ORIGINAL and not layout.tensors and is_hub_id and not offline:
        # Without its weight files a hub's projector-only folder cannot be told from a whole model.
        root = find_source(name, "language model")
        layout = read_layout(root.folder)
    if layout.kind is LayoutKind.VISION_TOWER:
        raise ModelError(f"{name} is a vision tower, not a language model; give it as vision_tower.")
    if layout.folder != root.folder:  # a run's checkpoint, whose model is a folder below
        root = Source(str(layout.folder), layout.folder, str(layout.folder))
    return root, layout


def find_language_model(
    config: ModelConfig, root: Source, layout: Layout, *, weights: bool, offline: bool = False
) -> Source:
    """Find the language model: inside the folder, else the base that is configured or named. Raises ModelError."""
    if layout.has_language_model:
        inside = part_of(layout, root.name, LANGUAGE_MODEL, weights=weights)
        _check_configured_part(config.model_base, inside, LANGUAGE_MODEL, layout)
        return inside
    base = config.model_base or layout.base
    if base is None:
        raise ModelError(
            f"{root.name} ({layout.kind}) holds no language model and does not name its base; give the one that it "
            "was trained over as model_base."
        )
    if config.model_base is None:
        _check_there(base, LANGUAGE_MODEL, root, "model_base")
    source = find_part(base, LANGUAGE_MODEL, weights=weights, offline=offline)
    _check_base(layout, source)
    return source


def find_vision_tower(
    config: ModelConfig, root: Source, layout: Layout, *, weights: bool, offline: bool = False
) -> Source:
    """Find the tower: inside the folder, else the one that is configured or named. Raises ModelError."""
    if layout.has_vision_tower:
        inside = part_of(
            layout, root.name, VISION_TOWER, weights=weights, settings_from=config.vision_tower, offline=offline
        )
        if inside.beside == inside.folder:
            _check_configured_part(config.vision_tower, inside, VISION_TOWER, layout)
        return inside
    named = layout.vision_tower
    if named and is_folder(layout.folder / named):
        named = str(layout.folder / named)
    tower = config.vision_tower or named
    if not tower:
        raise ModelError(
            f"{config.model_name_or_path} is a {layout.kind} that names no vision tower, and model.vision_tower is not "
            "set; name a CLIP, SigLIP or DINOv2 tower, or start from a llava_ray bundle, which brings its own."
        )
    if config.vision_tower is None:
        _check_there(tower, VISION_TOWER, root, "vision_tower")
    return find_part(tower, VISION_TOWER, weights=weights, offline=offline)


def _check_there(named: str, part: PartName, root: Source, setting: str) -> None:
    """Raise ModelError if the folder of a part that a model names does not exist."""
    if Path(named).is_absolute() and not is_folder(Path(named)):
        raise ModelError(
            f"no such {part.replace('_', ' ')}: {root.name} names the folder {named}, which does not exist. Copy both "
            f"with the same relative paths, or give its place with {setting}."
        )


def _check_configured_part(configured: str | None, inside: Source, part: PartName, layout: Layout) -> None:
    """Raise ModelError if another part is configured than the one inside the folder."""
    if configured is not None and configured != inside.origin and str(Path(configured).resolve()) != inside.origin:
        raise ModelError(
            f"{layout.folder} includes its own {part.replace('_', ' ')} (from {inside.origin}), but {configured} is "
            "configured; leave the setting out, or start from the plain language model."
        )


def _check_base(layout: Layout, base: Source) -> None:
    """Raise ModelError if an adapter or projector records another base language model."""
    if layout.language_config is None:
        return
    trained = make_config(layout.language_config, layout.folder, "language model").to_dict()
    base_config = make_config(base.config, base.folder, "language model").to_dict()
    for key in _SHAPE_KEYS:
        if trained.get(key) != base_config.get(key):
            raise ModelError(
                f"{base.name} is not the base that {layout.folder} was trained over: {key} is {base_config.get(key)!r} "
                f"in its config.json, expected {trained.get(key)!r}. Give the right one as model_base"
                + (f" ({layout.base})." if layout.base else ".")
            )
