"""Export of a model as a llava_ray bundle, tensor by tensor, without rounding."""

from pathlib import Path
from typing import Literal

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
from llava_ray.model.formats.exported_tokenizer import write_tokenizer
from llava_ray.model.formats.layout import PROJECTOR_FILE
from llava_ray.model.formats.manifest import ManifestPart, fingerprint_weights, library_versions, write_manifest
from llava_ray.model.formats.model_files import ORIGINAL_CONFIG, TOWER_FOLDER, ModelFiles
from llava_ray.model.formats.names import LANGUAGE_MODEL_PREFIX, PROJECTOR_PREFIX
from llava_ray.model.tensors.weight_files import Stored, write_folder, write_weight_file


def export_bundle(
    model: ModelFiles, output: str | Path, vocabulary: Literal["kept", "truncated"] = "truncated"
) -> Exported:
    """Write a llava_ray bundle with all parts inside. Raises ModelError or BundleError."""
    model, rows = with_vocabulary(model, vocabulary)
    manifest = model.manifest
    with new_folder(output) as new:
        write_weight_file(new / PROJECTOR_FILE, _projector_and_newline(model))
        language = new / "language_model"
        language.mkdir()
        write_json_file(language / "config.json", with_dtype(model.language_config, model.part(LANGUAGE_MODEL_PREFIX)))
        if model.generation_config:
            write_json_file(language / "generation_config.json", model.generation_config)
        write_folder(language, model.part(LANGUAGE_MODEL_PREFIX))
        write_tower(new / TOWER_FOLDER, model)
        write_tokenizer(load_own_tokenizer(model), model.tokenizer_folder, new, num_rows=rows)
        parts = {
            key: ManifestPart(inside=True, base=getattr(manifest, key).base, fingerprint=fingerprint_weights(new / key))
            for key in ("language_model", "vision_tower")
        }
        training = {**manifest.training, **({ORIGINAL_CONFIG: model.kept} if model.kept else {})}
        bundle_manifest = manifest.model_copy(update={**parts, "libraries": library_versions(), "training": training})
        write_manifest(new, bundle_manifest, output)
    return Exported(Path(output))


def _projector_and_newline(model: ModelFiles) -> dict[str, Stored]:
    return {name.removeprefix(PROJECTOR_PREFIX): tensor for name, tensor in projector_tensors_of(model).items()}
