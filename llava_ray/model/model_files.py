"""A whole model as files: what it is and where its tensors lie, whatever layout it comes in. Nothing is loaded."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_ray.errors import ModelError
from llava_ray.model import hub_settings, original_settings
from llava_ray.model.manifest import Manifest, Part, check_fingerprint, is_bundle, read_manifest
from llava_ray.model.part_configs import complete
from llava_ray.model.projector import PROJECTOR_FILE
from llava_ray.model.published_names import (
    COMPUTED,
    IMAGE_NEWLINE,
    LANGUAGE_MODEL,
    PROJECTOR,
    VISION_MODEL,
    VISION_TOWER,
    bare_tower_name,
    from_hub,
    from_original,
)
from llava_ray.model.sources import find_source
from llava_ray.model.weight_files import Stored, read_file, read_folder

WITH_TEXT_PART = ("clip", "siglip")  # whole models, whose vision part is the tower
ORIGINAL_CONFIG = "original_config"  # in a manifest's training: what of the original's config means nothing to us
TOWER_FOLDER = "vision_tower"


@dataclass(frozen=True)
class Asked:
    """What is told of a model because its folder does not say it."""

    model_base: str | None
    vision_tower: str | None
    version: str | None


@dataclass(frozen=True)
class ModelFiles:
    """A model that has not been loaded. ``tensors`` are under our names (see ``published_names``).

    ``num_rows`` is how many rows of the vocabulary are the language model's own: the hub layout may have added more.
    ``preprocessor`` is the tower's image processor as its preprocessor_config.json holds it. ``kept`` is LLaVA's part
    of an original config.json, to be given back to it. ``noted_template`` is () or the one chat template (or None) that
    the tokenizer had before it was exported to the hub layout.
    """

    folder: Path
    manifest: Manifest
    language_config: dict[str, Any]
    tower_config: dict[str, Any]
    preprocessor: dict[str, Any]
    generation_config: dict[str, Any]
    tensors: dict[str, Stored]
    num_rows: int
    kept: dict[str, Any]
    noted_template: tuple[str | None, ...] = ()

    def part(self, prefix: str) -> dict[str, Stored]:
        """Return one part's tensors, without its prefix."""
        return {name.removeprefix(prefix): tensor for name, tensor in self.tensors.items() if name.startswith(prefix)}


def open_model(
    path: str | Path,
    *,
    model_base: str | None = None,
    vision_tower: str | None = None,
    version: str | None = None,
) -> ModelFiles:
    """Find out what a folder is and where its tensors are, from what it declares.

    ``model_base`` and ``vision_tower`` are where parts that it only names lie now, ``version`` is its conversation
    template where it does not say it. Raises ModelError for a folder that is none of the known layouts, lacks a part
    or is damaged.
    """
    folder, asked = Path(path).expanduser(), Asked(model_base, vision_tower, version)
    if is_bundle(folder):
        return _checked(_open_bundle(folder, asked))
    config = read_json(folder / "config.json", f"{folder} is no model that can be exported: ")
    if (folder / "adapter_config.json").is_file():
        raise ModelError(
            f"{folder} holds an adapter without its base. Merge it first: export.py merge {folder} OUTPUT --model_base "
            "BASE, then export OUTPUT."
        )
    if hub_settings.is_hub(config):
        return _checked(_open_hub(folder, config, asked))
    if original_settings.is_original(config):
        return _checked(_open_original(folder, config, asked))
    raise ModelError(
        f"{folder} is none of the layouts that can be exported: its config.json is of type "
        f"{config.get('model_type')!r}, without text_config and without LLaVA's mm_* keys, and there is no llava.json. "
        "Point at a llava_ray bundle, or at a model in the original or the hub layout."
    )


def read_json(file: Path, what: str = "") -> dict[str, Any]:
    """Read a JSON object. Raises ModelError that names the file."""
    try:
        values: Any = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ModelError(
            f"{what}{file} cannot be read ({reason}); copy the folder again or point at another."
        ) from error
    if not isinstance(values, dict):
        raise ModelError(f"{what}{file} holds {type(values).__name__}; expected a JSON object.")
    return values


def read_tower(folder: Path) -> dict[str, Stored]:
    """Return a tower folder's tensors under our names; of a whole CLIP or SigLIP, those of its vision part."""
    stored = read_folder(folder)
    if read_json(folder / "config.json").get("model_type") in WITH_TEXT_PART:
        stored = {name: tensor for name, tensor in stored.items() if name.startswith(VISION_MODEL)}
    return {VISION_TOWER + bare_tower_name(n): t for n, t in stored.items() if not COMPUTED.search(n)}


def _open_bundle(folder: Path, asked: Asked) -> ModelFiles:
    if (folder / "adapter").is_dir():
        raise ModelError(
            f"{folder} is a bundle with an adapter that is not merged into its language model. Merge it first: "
            f"export.py merge {folder} OUTPUT, then export OUTPUT."
        )
    manifest = read_manifest(folder)
    language = _find_part(folder / "language_model", manifest.language_model, asked.model_base, "language model")
    tower = _find_part(folder / TOWER_FOLDER, manifest.vision_tower, asked.vision_tower, "vision tower")
    config = complete(read_json(language / "config.json"), str(language / "config.json"))
    named = {name if name == IMAGE_NEWLINE else PROJECTOR + name: t for name, t in read_projector(folder).items()}
    own = {LANGUAGE_MODEL + name: t for name, t in read_folder(language).items() if not COMPUTED.search(name)}
    training = dict(manifest.training)
    kept = training.pop(ORIGINAL_CONFIG, {})
    version = {} if asked.version is None else {"version": asked.version}
    return ModelFiles(
        folder=folder,
        manifest=manifest.model_copy(update={"training": training, **version}),
        language_config=config,
        generation_config=_optional_json(language / "generation_config.json"),
        tensors={**named, **own, **read_tower(tower)},
        num_rows=config["vocab_size"],
        kept=kept,
        **_tower_settings(tower),
    )


def read_projector(folder: Path) -> dict[str, Stored]:
    """Return a bundle's projector, and image_newline where there is one, by the names in its file."""
    return read_file(folder / PROJECTOR_FILE)


def _find_part(inside: Path, part: Part, given: str | None, name: str) -> Path:
    if part.inside:
        return inside
    folder = find_source(given or part.base, name).folder
    check_fingerprint(folder, part.fingerprint, name)
    return folder


def _open_original(folder: Path, config: dict[str, Any], asked: Asked) -> ModelFiles:
    language = original_settings.read_language_config(folder, config)
    manifest = original_settings.read_manifest(folder, config, asked.version)
    stored = {from_original(n): t for n, t in read_folder(folder).items() if not COMPUTED.search(n)}
    inside = folder / TOWER_FOLDER
    named = asked.vision_tower or (inside if inside.is_dir() else manifest.vision_tower.base)
    if not named:
        raise ModelError(f"{folder / 'config.json'} names no mm_vision_tower; say where it is with --vision_tower.")
    tower = find_source(named, "vision tower").folder
    # A tower that learnt too lies among the shards; the one that config.json names is what it began as.
    own_tower = {name: tensor for name, tensor in stored.items() if name.startswith(VISION_TOWER)}
    return ModelFiles(
        folder=folder,
        manifest=manifest,
        language_config=language,
        generation_config=_optional_json(folder / "generation_config.json"),
        tensors={**stored, **(own_tower or read_tower(tower))},
        num_rows=language["vocab_size"],
        kept=original_settings.read_kept(config),
        **_tower_settings(tower),
    )


def _open_hub(folder: Path, config: dict[str, Any], asked: Asked) -> ModelFiles:
    settings = hub_settings.read_settings(folder, config, _hub_preprocessor(folder), asked.version)
    return ModelFiles(
        folder=folder,
        manifest=settings.manifest,
        language_config=settings.language_config,
        tower_config=settings.tower_config,
        preprocessor=settings.preprocessor,
        generation_config=_optional_json(folder / "generation_config.json"),
        tensors={from_hub(n): t for n, t in read_folder(folder).items() if not COMPUTED.search(n)},
        num_rows=settings.num_rows,
        kept=settings.kept,
        noted_template=settings.noted_template,
    )


def _checked(model: ModelFiles) -> ModelFiles:
    """Return the model; raise ModelError if a part is not there or the projector is not the configs'."""
    manifest, projector = model.manifest, model.part(PROJECTOR)
    for prefix in (LANGUAGE_MODEL, VISION_TOWER, *([] if manifest.mm_projector_type == "identity" else [PROJECTOR])):
        if not model.part(prefix):
            raise ModelError(
                f"{model.folder} holds no tensors of the {prefix.rstrip('.').replace('_', ' ')}, though it is a model "
                f"with one (mm_projector_type {manifest.mm_projector_type!r}); copy the folder again."
            )
    in_order = sorted(projector, key=lambda name: (len(name), name))  # "10.weight" after "2.weight"
    matrices = [projector[name].shape for name in in_order if name.endswith("weight")]
    widths = (matrices[0][-1], matrices[-1][0]) if matrices else (manifest.mm_hidden_size, manifest.hidden_size)
    if widths != (manifest.mm_hidden_size, manifest.hidden_size):
        raise ModelError(
            f"the projector in {model.folder} goes from width {widths[0]} to {widths[1]}, but tower and language model "
            f"have {manifest.mm_hidden_size} and {manifest.hidden_size}: these are not one model's files."
        )
    return model


def _tower_settings(folder: Path) -> dict[str, Any]:
    config = read_json(folder / "config.json")
    if config.get("model_type") in WITH_TEXT_PART:
        config = {"model_type": f"{config['model_type']}_vision_model", **config.get("vision_config", {})}
    return {
        "tower_config": complete(config, str(folder / "config.json")),
        "preprocessor": read_json(folder / "preprocessor_config.json"),
    }


def _hub_preprocessor(folder: Path) -> Mapping[str, Any]:
    if (folder / "preprocessor_config.json").is_file():
        return read_json(folder / "preprocessor_config.json")
    # transformers 5 keeps it among the processor's own settings.
    inside = read_json(folder / "processor_config.json").get("image_processor")
    if not isinstance(inside, dict):
        raise ModelError(f"{folder} has no preprocessor_config.json; copy it from where the model was published.")
    return inside


def _optional_json(file: Path) -> dict[str, Any]:
    return read_json(file) if file.is_file() else {}
