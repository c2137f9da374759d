"""Export of a model, or its projector alone, to the original layout, tensor by tensor, without rounding."""

from pathlib import Path
from typing import Any, Literal

import torch

from llava_ray.config.geometry import find_unknown_elsewhere
from llava_ray.errors import ModelError
from llava_ray.model.formats.export_folder import (
    Exported,
    load_own_tokenizer,
    new_folder,
    projector_tensors_of,
    with_dtype,
    with_vocabulary,
    write_json_file,
    write_tower,
)
from llava_ray.model.formats.exported_tokenizer import SENTENCEPIECE_FILE, write_tokenizer
from llava_ray.model.formats.layout import ORIGINAL_PROJECTOR_FILE
from llava_ray.model.formats.model_files import TOWER_FOLDER, ModelFiles
from llava_ray.model.formats.names import LANGUAGE_MODEL_PREFIX, VISION_TOWER_PREFIX
from llava_ray.model.formats.original.names import to_original
from llava_ray.model.formats.original.settings import TYPES, write_llava_settings, write_original_settings
from llava_ray.model.tensors.weight_files import write_folder


def export_original(
    model: ModelFiles, output: str | Path, vocabulary: Literal["kept", "truncated"] = "truncated"
) -> Exported:
    """Write the original layout, with the tower in ``vision_tower/``. Raises ModelError if it cannot express it."""
    _check_original(model)
    model, rows = with_vocabulary(model, vocabulary)
    with new_folder(output) as new:
        write_json_file(new / "config.json", original_config(model))
        if model.generation_config:
            write_json_file(new / "generation_config.json", model.generation_config)
        shards = {to_original(n): t for n, t in model.tensors.items() if not n.startswith(VISION_TOWER_PREFIX)}
        write_folder(new, shards)
        write_tower(new / TOWER_FOLDER, model)
        write_tokenizer(load_own_tokenizer(model), model.tokenizer_folder, new, num_rows=rows)
        slow = (new / SENTENCEPIECE_FILE).is_file()
    notes = [
        f"config.json names the tower {model.manifest.vision_tower.base!r}, where the original code looks for it; "
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
    tensors = {to_original(name): tensor.load().clone() for name, tensor in projector_tensors_of(model).items()}
    if not tensors:
        raise ModelError(f"projector: that of {model.folder} is 'identity', which has no tensors to write.")
    with new_folder(output) as new:
        torch.save(tensors, new / ORIGINAL_PROJECTOR_FILE)
        write_json_file(new / "config.json", original_config(model))
    return Exported(Path(output))


def _check_original(model: ModelFiles) -> None:
    """Raise ModelError, naming the part, for a model that the original code cannot load."""
    kind, tower = model.language_config["model_type"], model.tower_config["model_type"]
    if kind not in TYPES:
        raise ModelError(
            f"language model: the original layout has {' and '.join(TYPES)} only, this one is "
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
            "original code supports one. Keep the bundle."
        )


def original_config(model: ModelFiles) -> dict[str, Any]:
    """Return the original layout's config.json; of a language model that it does not know, with that one's own type.

    Raises ModelError for a setting that the original code does not know.
    """
    if unknown := find_unknown_elsewhere(model.manifest):
        raise ModelError(
            f"settings: {unknown} is {getattr(model.manifest, unknown)!r}, which the original code does not know and "
            "would pass over in silence. Keep the bundle."
        )
    if model.language_config["model_type"] not in TYPES:
        return {**model.language_config, **write_llava_settings(model.manifest, model.kept)}
    config = with_dtype(model.language_config, model.part(LANGUAGE_MODEL_PREFIX))
    return write_original_settings(model.manifest, config, model.kept)
