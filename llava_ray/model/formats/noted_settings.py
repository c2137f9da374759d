"""Settings that our export stored in the hub layout's config.json, reconciled with the file's own keys. No torch."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from llava_ray.errors import ModelError
from llava_ray.model.formats.manifest import Manifest, absolute_base, faults_of, with_bases
from llava_ray.reading import short_repr

# The key under which our export stores settings that a layout has no key for.
OUR_KEY = "llava_ray"
# Manifest fields of a model's origin, not of the model itself.
_NO_SETTINGS = {"format_version", "language_model", "vision_tower", "libraries", "training"}
# Settings that the hub layout's config.json has as well, with their keys there.
MIRRORED = {
    "mm_vision_select_layer": "vision_feature_layer",
    "mm_vision_select_feature": "vision_feature_select_strategy",
    "image_grid_pinpoints": "image_grid_pinpoints",
}
# Settings that model_type decides: llava_next is anyres.
OF_TYPE: dict[str, Any] = {"image_aspect_ratio": "square", "mm_patch_merge_type": "flat", "image_grid_pinpoints": ()}


def find_noted(config: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """Return the values under our key in a config.json; {} without. Raises ModelError that names the key."""
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
    """Read the manifest of the exported model. Raises ModelError that names the key."""
    if not noted.get("manifest"):
        return None
    try:
        manifest = Manifest.model_validate(noted["manifest"])
        return with_bases(manifest, lambda base: absolute_base(base, Path(where).parent))
    except ValidationError as error:
        raise ModelError(f"{where}: {OUR_KEY}.manifest is not a valid manifest: {faults_of(error)}; fix it.") from error


def reconcile_settings(
    noted: Mapping[str, Any], own: Mapping[str, Any], config: Mapping[str, Any], *, same_features: bool
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return the stored settings, updated with the file's own values, and notes on what has changed.

    ``own`` are the settings of the file's own keys; ``same_features`` if the tower has no class token, so that both
    values of mm_vision_select_feature mean the same.
    """
    settings, notes = {key: value for key, value in noted.items() if key not in _NO_SETTINGS}, []
    was = settings.get("image_aspect_ratio")
    if was is not None and (own["image_aspect_ratio"] == "anyres") != (was == "anyres"):
        notes.append(describe_change("model_type", config["model_type"], was))
        settings |= {key: own.get(key, value) for key, value in OF_TYPE.items()}
    for key, own_key in MIRRORED.items():
        if own_key not in config or not {key} <= own.keys() & settings.keys():
            continue
        if own[key] != settings[key] and not (key == "mm_vision_select_feature" and same_features):
            notes.append(describe_change(own_key, config[own_key], settings[key]))
            settings[key] = own[key]
    return settings, tuple(notes)


def describe_change(key: str, value: object, exported: object) -> str:
    """Return the note that a file has another value than was exported."""
    return (
        f"{key} is {short_repr(value)}, but the model was exported with {short_repr(exported)}; the "
        "file's own value is used"
    )


def _unfit(where: str, key: str, value: object, expected: str) -> ModelError:
    return ModelError(f"{where}: {key} is {short_repr(value)}, expected {expected}; fix it, or export the model again.")
