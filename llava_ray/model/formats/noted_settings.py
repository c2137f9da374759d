"""What an export of ours noted in the hub layout's config.json, beside what the file says itself now. No torch."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from llava_ray.errors import ModelError
from llava_ray.model.formats.manifest import Manifest, absolute_base, faults_of, with_bases
from llava_ray.reading import shown

# Where an export of ours keeps what a layout has no key for.
OUR_KEY = "llava_ray"
# What a manifest says of where a model is from, not of what it is.
_NO_SETTINGS = {"format_version", "language_model", "vision_tower", "libraries", "training"}
# Settings that a config.json in the hub layout says as well, and the keys under which it does.
MIRRORED = {
    "mm_vision_select_layer": "vision_feature_layer",
    "mm_vision_select_feature": "vision_feature_select_strategy",
    "image_grid_pinpoints": "image_grid_pinpoints",
}
# What model_type decides: llava_next is anyres.
OF_TYPE: dict[str, Any] = {"image_aspect_ratio": "square", "mm_patch_merge_type": "flat", "image_grid_pinpoints": ()}


def find_noted(config: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """Return what stands under our key in a config.json; {} for nothing. Raises ModelError that names the key."""
    noted = config.get(OUR_KEY, {})
    if not isinstance(noted, Mapping):
        raise _unfit(where, OUR_KEY, noted, "a table")
    kinds: dict[str, type] = dict.fromkeys(("manifest", "training", "kept", "preprocessor"), dict) | {"version": str}
    for key, kind in kinds.items():
        if not isinstance(noted.get(key, kind()), kind):
            raise _unfit(where, f"{OUR_KEY}.{key}", noted[key], "a text" if kind is str else "a table")
    rows, template = noted.get("num_rows", 1), noted.get("chat_template")
    if type(rows) is not int or rows < 1:
        raise _unfit(where, f"{OUR_KEY}.num_rows", rows, "a number of rows")
    if template is not None and not isinstance(template, str):
        raise _unfit(where, f"{OUR_KEY}.chat_template", template, "a text")
    return noted


def read_noted_manifest(noted: Mapping[str, Any], where: str) -> Manifest | None:
    """Return the manifest of the model that was exported. Raises ModelError that names the key."""
    if not noted.get("manifest"):
        return None
    try:
        manifest = Manifest.model_validate(noted["manifest"])
        return with_bases(manifest, lambda base: absolute_base(base, Path(where).parent))
    except ValidationError as error:
        raise ModelError(f"{where}: {OUR_KEY}.manifest is no manifest of ours: {faults_of(error)}; fix it.") from error


def reconciled(
    noted: Mapping[str, Any], own: Mapping[str, Any], config: Mapping[str, Any], *, same_features: bool
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return the settings that an export noted, as the config.json says them now, and what has been changed since.

    ``own`` are the settings that the file has by itself; ``same_features`` says that the tower has no class token, so
    that both words for its features mean one thing.
    """
    settings, notes = {key: value for key, value in noted.items() if key not in _NO_SETTINGS}, []
    was = settings.get("image_aspect_ratio")
    if was is not None and (own["image_aspect_ratio"] == "anyres") != (was == "anyres"):
        notes.append(changed("model_type", config["model_type"], was))
        settings |= {key: own.get(key, value) for key, value in OF_TYPE.items()}
    for key, told in MIRRORED.items():
        if told not in config or not {key} <= own.keys() & settings.keys():
            continue
        if own[key] != settings[key] and not (key == "mm_vision_select_feature" and same_features):
            notes.append(changed(told, config[told], settings[key]))
            settings[key] = own[key]
    return settings, tuple(notes)


def changed(key: str, value: object, exported: object) -> str:
    """Say that a file has another value than the one that was exported."""
    return f"{key} is {shown(value)}, but the model was exported with {shown(exported)}; the file's own value is used"


def _unfit(where: str, key: str, value: object, expected: str) -> ModelError:
    return ModelError(f"{where}: {key} is {shown(value)}, expected {expected}; fix it, or export the model again.")
