"""Checks that a model's parts fit together: widths, shapes and image processor, from headers alone."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING

from llava_ray.config.geometry import compute_feature_width
from llava_ray.errors import ModelError
from llava_ray.model.formats.hub.processor import read_preprocessor, write_preprocessor
from llava_ray.model.formats.layout import CONFIG, Layout, LayoutKind
from llava_ray.model.formats.manifest import Manifest
from llava_ray.model.formats.names import PROJECTOR_PREFIX
from llava_ray.model.formats.noted_settings import describe_change
from llava_ray.model.formats.part_configs import build_config
from llava_ray.model.formats.preprocessor import check_preprocessor
from llava_ray.model.formats.pretrained import check_shapes
from llava_ray.model.formats.sources import Source
from llava_ray.model.formats.token_rows import check_table
from llava_ray.model.tensors.tensor_files import read_json_object
from llava_ray.reading import is_file

if TYPE_CHECKING:
    from llava_ray.model.formats.model_files import ModelFiles

_PREPROCESSOR = "preprocessor_config.json"


def find_preprocessor(
    layout: Layout, tower: Source, noted: Mapping[str, Any], manifest: Manifest
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return the tower's own image processor settings, with notes for the user. Raises ModelError."""
    file = layout.folder / _PREPROCESSOR
    if layout.kind is not LayoutKind.HUB:
        return _checked_preprocessor(read_json_object(tower.beside / _PREPROCESSOR), tower.beside / _PREPROCESSOR), ()
    values: Any
    if is_file(file):
        values = read_json_object(file)
    else:  # transformers 5 stores it inside the processor's settings.
        file = layout.folder / "processor_config.json"
        values = read_json_object(file).get("image_processor")
    if not isinstance(values, dict):
        raise ModelError(f"{layout.folder} has no {_PREPROCESSOR}; copy it from where the model was published.")
    if "preprocessor" not in noted:
        return _checked_preprocessor(read_preprocessor(values), file), ()
    exported = _checked_preprocessor(noted["preprocessor"], layout.folder / CONFIG)
    expected = write_preprocessor(exported, manifest)
    changed_keys = [key for key in sorted(values.keys() & exported.keys()) if values[key] != expected[key]]
    merged = _checked_preprocessor({**exported, **{key: values[key] for key in changed_keys}}, file)
    return merged, tuple(f"{file}: {describe_change(key, values[key], expected[key])}" for key in changed_keys)


def _checked_preprocessor(values: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """Check and return an image processor's settings. Raises ModelError for invalid ones."""
    check_preprocessor(values, str(file))
    return dict(values)


def check_parts(model: "ModelFiles", language: Source, tower: Source, config: Mapping[str, Any]) -> None:
    """Raise ModelError if weights have other shapes than the parts' configs, or the projector does not fit them."""
    check_table(language.tensors, config, str(language.folder))
    check_shapes(
        MODEL_FOR_CAUSAL_LM_MAPPING, build_config(config, f"{language.folder / CONFIG}"), language, "language model"
    )
    vision = model.tower_config
    seeing = {name: t for name, t in tower.tensors.items() if not name.startswith(("text_model.", "logit_"))}
    check_shapes(
        MODEL_MAPPING, build_config(vision, f"{tower.beside / CONFIG}"), replace(tower, tensors=seeing), "vision tower"
    )
    _check_widths(model)


def _check_widths(model: "ModelFiles") -> None:
    """Raise ModelError if the projector's widths differ from those of the model's parts."""
    manifest, projector = model.manifest, model.part(PROJECTOR_PREFIX)
    in_order = sorted(projector, key=lambda name: (len(name), name))  # "10.weight" after "2.weight"
    matrices = [projector[name].shape for name in in_order if name.endswith("weight")]
    if any(len(shape) != 2 for shape in matrices):
        raise ModelError(f"the projector in {model.folder} has a weight that is not a matrix; copy the file again.")
    widths = (matrices[0][-1], matrices[-1][0]) if matrices else (manifest.mm_hidden_size, manifest.hidden_size)
    if widths != (manifest.mm_hidden_size, manifest.hidden_size):
        raise ModelError(
            f"the projector in {model.folder} goes from width {widths[0]} to {widths[1]}, but tower and language model "
            f"have {manifest.mm_hidden_size} and {manifest.hidden_size}: these are not one model's files."
        )
    tower_width = int(model.tower_config["hidden_size"])
    features = compute_feature_width(tower_width, manifest.mm_vision_select_layer, manifest.s2_scales)
    parts = (features, model.language_config["hidden_size"])
    if parts != (manifest.mm_hidden_size, manifest.hidden_size):
        raise ModelError(
            f"{model.folder}: its manifest says widths {manifest.mm_hidden_size} and {manifest.hidden_size}, but its "
            f"tower and language model have {parts[0]} and {parts[1]}: these are not one model's files."
        )
