"""A model's files written in another layout: the bundle, the original one, and parts of it. See ``hub_export``.

Tensors pass through one at a time, as they are stored; nothing is rounded. A folder is written whole or not at all.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedTokenizerBase

from llava_ray.errors import ModelError
from llava_ray.model import original_settings
from llava_ray.model.exported_tokenizer import SENTENCEPIECE_FILE, write_tokenizer
from llava_ray.model.layout import ORIGINAL_PROJECTOR_FILE
from llava_ray.model.manifest import Part, fingerprint, library_versions, write_manifest
from llava_ray.model.model_files import ORIGINAL_CONFIG, TOWER_FOLDER, ModelFiles
from llava_ray.model.projector import PROJECTOR_FILE
from llava_ray.model.published_names import (
    IMAGE_NEWLINE,
    LANGUAGE_MODEL,
    PROJECTOR,
    VISION_MODEL,
    VISION_TOWER,
    to_original,
)
from llava_ray.model.sources import load_padding_tokenizer
from llava_ray.model.vocabulary_rows import EMBEDDINGS, with_rows
from llava_ray.model.weight_files import Stored, write_file, write_folder
from llava_ray.model.weights import replacing

# Towers whose tensors transformers 4 and vLLM look for one level deeper.
WITH_VISION_MODEL = ("clip_vision_model", "siglip_vision_model")


@dataclass(frozen=True)
class Exported:
    """Where an export is, and what has to be said of it."""

    folder: Path
    notes: tuple[str, ...] = ()


def export_bundle(
    model: ModelFiles, output: str | Path, vocabulary: Literal["kept", "truncated"] = "truncated"
) -> Exported:
    """Write a llava_ray bundle with all parts inside. Raises ModelError or BundleError."""
    model, rows = _with_vocabulary(model, vocabulary)
    manifest = model.manifest
    with new_folder(output) as new:
        write_file(new / PROJECTOR_FILE, _projector_and_newline(model))
        language = new / "language_model"
        language.mkdir()
        write_json(language / "config.json", with_dtype(model.language_config, model.part(LANGUAGE_MODEL)))
        if model.generation_config:
            write_json(language / "generation_config.json", model.generation_config)
        write_folder(language, model.part(LANGUAGE_MODEL))
        _write_tower(new / TOWER_FOLDER, model)
        write_tokenizer(load_own_tokenizer(model), model.tokenizer_folder, new, num_rows=rows)
        parts = {
            key: Part(inside=True, base=getattr(manifest, key).base, fingerprint=fingerprint(new / key))
            for key in ("language_model", "vision_tower")
        }
        training = {**manifest.training, **({ORIGINAL_CONFIG: model.kept} if model.kept else {})}
        written = manifest.model_copy(update={**parts, "libraries": library_versions(), "training": training})
        write_manifest(new, written, output)
    return Exported(Path(output))


def export_original(
    model: ModelFiles, output: str | Path, vocabulary: Literal["kept", "truncated"] = "truncated"
) -> Exported:
    """Write the original layout, with the tower in ``vision_tower/``. Raises ModelError for what it cannot express."""
    check_original(model)
    model, rows = _with_vocabulary(model, vocabulary)
    with new_folder(output) as new:
        write_json(new / "config.json", original_config(model))
        if model.generation_config:
            write_json(new / "generation_config.json", model.generation_config)
        shards = {to_original(n): t for n, t in model.tensors.items() if not n.startswith(VISION_TOWER)}
        write_folder(new, shards)
        _write_tower(new / TOWER_FOLDER, model)
        write_tokenizer(load_own_tokenizer(model), model.tokenizer_folder, new, num_rows=rows)
        slow = (new / SENTENCEPIECE_FILE).is_file()
    notes = [
        f"config.json names the tower {model.manifest.vision_tower.base!r}, where the original code will look for it; "
        f"this model's own is in {Path(output) / TOWER_FOLDER}"
    ]
    if not slow:
        notes.append(
            f"the original code reads its tokenizer from {SENTENCEPIECE_FILE}, which {model.tokenizer_folder} does not "
            "have: copy it from the language model's publisher"
        )
    return Exported(Path(output), tuple(notes))


def export_projector(model: ModelFiles, output: str | Path) -> Exported:
    """Write LLaVA's mm_projector.bin and the config.json that describes it. Raises ModelError or BundleError."""
    tensors = {to_original(name): tensor.load().clone() for name, tensor in _projector(model).items()}
    if not tensors:
        raise ModelError(f"projector: that of {model.folder} is 'identity', which has no tensors to write.")
    with new_folder(output) as new:
        torch.save(tensors, new / ORIGINAL_PROJECTOR_FILE)
        write_json(new / "config.json", original_config(model))
    return Exported(Path(output))


def check_original(model: ModelFiles) -> None:
    """Raise ModelError, naming the part, for what the original code cannot load."""
    kind, tower = model.language_config["model_type"], model.tower_config["model_type"]
    if kind not in original_settings.TYPES:
        raise ModelError(
            f"language model: the original layout has {' and '.join(original_settings.TYPES)} only, this one is "
            f"{kind!r}. Export it as hub or keep the bundle."
        )
    if tower != "clip_vision_model":
        raise ModelError(
            f"vision tower: the original code loads CLIP towers only, this one is {tower!r}. Export it as hub or keep "
            "the bundle."
        )
    if not isinstance(model.manifest.mm_vision_select_layer, int):
        raise ModelError(
            f"vision tower: features of several layers {model.manifest.mm_vision_select_layer} are selected, the "
            "original code knows one. Keep the bundle."
        )


def original_config(model: ModelFiles) -> dict[str, Any]:
    """Return the original layout's config.json; of a language model that it does not know, with that one's own type."""
    if model.language_config["model_type"] not in original_settings.TYPES:
        return {**model.language_config, **original_settings.write_llavas(model.manifest, model.kept)}
    config = with_dtype(model.language_config, model.part(LANGUAGE_MODEL))
    return original_settings.write_settings(model.manifest, config, model.kept)


def load_own_tokenizer(model: ModelFiles) -> PreTrainedTokenizerBase:
    """Load the tokenizer with the language model's own chat template, which a hub folder has replaced by LLaVA's."""
    tokenizer = load_padding_tokenizer(model.tokenizer_folder)
    if model.noted_template:
        tokenizer.chat_template = model.noted_template[0]
    return tokenizer


@contextmanager
def new_folder(output: str | Path) -> Iterator[Path]:
    """Give a folder that becomes ``output`` once all is written. Raises ModelError if something is there already."""
    refuse_existing(output)
    with replacing(Path(output).absolute()) as new:
        yield new


def refuse_existing(output: str | Path) -> None:
    """Raise ModelError if something is there already."""
    folder = Path(output)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ModelError(f"{folder} is there already; an export overwrites nothing. Choose another folder.")


def with_dtype(config: Mapping[str, Any], tensors: Mapping[str, Stored]) -> dict[str, Any]:
    """Return a part's config with the dtype that its tensors have."""
    values = {key: value for key, value in config.items() if key != "torch_dtype"}
    return values | {"dtype": str(next(iter(tensors.values())).dtype).removeprefix("torch.")}


def write_json(file: Path, values: Mapping[str, Any]) -> None:
    """Write a JSON file as people read it."""
    file.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n")


def _with_vocabulary(model: ModelFiles, vocabulary: Literal["kept", "truncated"]) -> tuple[ModelFiles, int]:
    """Return the model with its table kept or cut to the language model's own rows, and their number."""
    if EMBEDDINGS not in model.tensors:  # another naming than Llama's: never lengthened, so never cut
        return model, model.num_rows
    rows = model.num_rows if vocabulary == "truncated" else model.tensors[EMBEDDINGS].shape[0]
    config = {**model.language_config, "vocab_size": rows}
    return replace(model, tensors=with_rows(model.tensors, rows), language_config=config), rows


def _projector(model: ModelFiles) -> dict[str, Stored]:
    return {n: t for n, t in model.tensors.items() if n.startswith(PROJECTOR) or n == IMAGE_NEWLINE}


def _projector_and_newline(model: ModelFiles) -> dict[str, Stored]:
    return {name.removeprefix(PROJECTOR): tensor for name, tensor in _projector(model).items()}


def _write_tower(folder: Path, model: ModelFiles) -> None:
    folder.mkdir()
    write_json(folder / "config.json", with_dtype(model.tower_config, model.part(VISION_TOWER)))
    write_json(folder / "preprocessor_config.json", model.preprocessor)
    level = VISION_MODEL if model.tower_config["model_type"] in WITH_VISION_MODEL else ""
    write_folder(folder, {level + name: tensor for name, tensor in model.part(VISION_TOWER).items()})
