"""A run's identity, independent of folder names: fingerprints of its models, the hash of its prepared data.

Only the edges of weight files are read and no folder of images is walked, so it takes no time for models of any size.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llava_ray.config.finetune import FinetuneConfig
from llava_ray.config.mixtures import learnt_paths
from llava_ray.config.model import MODEL_PATHS
from llava_ray.config.recipes import hashed_settings, settings_hash
from llava_ray.config.schema import merge_settings, nest_keys
from llava_ray.config.sources import SOURCE_PATHS
from llava_ray.config.train import AUTOMATIC_SETTINGS
from llava_ray.errors import ConfigError
from llava_ray.model.formats.layout import PROJECTOR_FILE
from llava_ray.model.formats.manifest import edges_of, is_bundle, read_manifest
from llava_ray.reading import is_file, is_folder

SOURCES = "data.sources"
DATA_PATHS = ("data.data_path", "data.image_folder", "data.cache_dir")
# A run may be resumed with others: they decide how to go on after steps that were not finite, and how, not what, is
# computed.
CHANGEABLE = (
    "train.on_nonfinite",
    "train.fetch_loss_steps",
    "train.use_liger_kernel",
    "train.torch_compile",
    "grpo.num_rollout_actors",
    "grpo.gpus_per_rollout_actor",
)
DATA = "data"  # the key of the data in an identity
# Of a model's folder: weights, configs, tokenizer.
_MODEL_SUFFIXES = (".safetensors", ".bin", ".json", ".model", ".jinja", ".txt")
_SHORT_DIGITS = 12  # digits of a fingerprint in a message
NUM_DIGITS = 8  # of a hash in a run's name

Identity = Mapping[str, str]


def identify_run(config: FinetuneConfig, data_hash: str) -> Identity:
    """Return the fingerprint of each model that a run names, by its key, and the hash of its prepared data.

    Raises BundleError for a bundle whose manifest cannot be read.
    """
    settings = config.model_dump()
    named = {key: _look_up(settings, key) for key in MODEL_PATHS}
    return {key: identify_model(name) for key, name in named.items() if name} | {DATA: data_hash}


def identify_model(name: str) -> str:
    """Return a model's identity wherever it is stored: a hash of a folder or file, a hub id as it is."""
    folder = Path(name).expanduser()
    if is_file(folder):
        return edges_of(folder)
    if not is_folder(folder):
        return name
    if is_bundle(folder / "model"):  # of a run's folder or checkpoint
        folder = folder / "model"
    digest = hashlib.sha256()
    if is_bundle(folder):
        manifest = read_manifest(folder)
        parts = {"language_model", "vision_tower"}
        description = manifest.model_dump(mode="json", exclude={*parts, "libraries", "training"})
        description |= {part: getattr(manifest, part).fingerprint for part in parts}
        digest.update(json.dumps(description, sort_keys=True).encode())
        files = [folder / PROJECTOR_FILE]
    else:
        inside = [*folder.iterdir(), *(folder / "vision_tower").glob("*")]
        files = sorted(file for file in inside if file.suffix in _MODEL_SUFFIXES)
    for file in files:
        if is_file(file):
            digest.update(f"{file.relative_to(folder)} {edges_of(file)}\n".encode())
    return digest.hexdigest()


def identity_hash(config: FinetuneConfig, identity: Identity) -> str:
    """Return 8 hex digits of everything that determines a run's result: non-default settings, and the identity."""
    settings = hashed_settings(config.model_dump(mode="json", exclude_defaults=True))
    if config.data.sources:
        sources = [
            {key: value for key, value in one.items() if key not in SOURCE_PATHS} for one in settings["data"]["sources"]
        ]
        settings["data"] = {**settings["data"], "sources": sources}
    paths = {*MODEL_PATHS, *DATA_PATHS, *CHANGEABLE}
    hashed = {
        section: {key: value for key, value in values.items() if f"{section}.{key}" not in paths}
        for section, values in settings.items()
    }
    text = json.dumps([hashed, dict(identity)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:NUM_DIGITS]


def recipe_of_name(config: FinetuneConfig) -> str | None:
    """Return the recipe in a generated run name, which ends in a hash of the settings; None for a user's name."""
    recipe, _, key = str(config.run.name).rpartition("-")
    return recipe if recipe and key == settings_hash(config) else None


def comparable(
    saved_settings: Mapping[str, Any], config: FinetuneConfig, identity: Identity
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a run's saved settings and the current ones, made equal where only a path or a new default differs.

    A model at an unchanged path whose contents changed makes them differ.
    """
    now = config.model_dump(mode="json")
    saved = {key: value for key, value in saved_settings.items() if key != "identity"}
    known: Identity = saved_settings.get("identity") or {}
    then = _with_new_defaults(saved)
    same, other_then, other_now = {key: _look_up(now, key) for key in CHANGEABLE}, {}, {}
    for key in MODEL_PATHS:
        if key not in known or key not in identity:
            continue
        if known[key] == identity[key]:
            same[key] = _look_up(now, key)
        elif _look_up(then, key) == _look_up(now, key):
            other_then[key] = f"{_look_up(then, key)} with fingerprint {known[key][:_SHORT_DIGITS]}"
            other_now[key] = f"{_look_up(now, key)} with fingerprint {identity[key][:_SHORT_DIGITS]}"
    if known.get(DATA) == identity[DATA]:
        same |= {key: _look_up(now, key) for key in DATA_PATHS}
        if sources := _with_places(_look_up(then, SOURCES), _look_up(now, SOURCES)):
            same[SOURCES] = sources
    elif DATA in known and _look_up(then, DATA_PATHS[0]) == _look_up(now, DATA_PATHS[0]):
        path = ", ".join(learnt_paths(config.data).values())
        key = SOURCES if config.data.sources else DATA_PATHS[0]
        other_then[key] = f"{path} with data {known[DATA][:_SHORT_DIGITS]}"
        other_now[key] = f"{path} with data {identity[DATA][:_SHORT_DIGITS]}"
    # What a run decided for itself is kept; "auto" again is no other setting.
    same |= {key: "auto" for key in AUTOMATIC_SETTINGS if _look_up(now, key) == "auto"}
    return merge_settings(then, nest_keys(same | other_then)), merge_settings(now, nest_keys(other_now))


def _with_places(then: Any, now: Any) -> list[dict[str, Any]] | None:
    """Return the saved sources with the current paths; None where they are not the same sources."""
    if not then or not now or [one.get("name") for one in then] != [one.get("name") for one in now]:
        return None
    return [one | {key: new.get(key) for key in SOURCE_PATHS} for one, new in zip(then, now, strict=True)]


def _with_new_defaults(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return saved settings with defaults for newer ones; unchanged if they are no longer valid."""
    try:
        return FinetuneConfig.parsed(settings).model_dump(mode="json")
    except ConfigError:
        return dict(settings)


def _look_up(settings: Mapping[str, Any], key: str) -> Any:
    """Return the setting with a dotted key; None if it is absent."""
    section, _, name = key.partition(".")
    return (settings.get(section) or {}).get(name)
