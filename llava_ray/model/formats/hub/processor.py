"""preprocessor_config.json and processor_config.json of the hub layout."""

from collections.abc import Mapping
from typing import Any

from llava_ray.errors import ModelError
from llava_ray.model.formats.manifest import Manifest

_PROCESSORS = {"llava": "LlavaProcessor", "llava_next": "LlavaNextProcessor"}
# Settings that the layout's image processors have and a tower's own does not.
_PADDING = {"do_pad", "pad_size", "image_grid_pinpoints", "aspect_ratio_setting", "processor_class"}


def write_preprocessor(preprocessor: Mapping[str, Any], manifest: Manifest) -> dict[str, Any]:
    """Return the settings of an image processor equal to training's, under names that older versions know."""
    values = {**preprocessor, "image_processor_type": _older_type(preprocessor)}
    values.pop("feature_extractor_type", None)
    if manifest.image_aspect_ratio == "square":
        return values
    height, width = pixels_of(preprocessor)
    values |= {"do_pad": True, "do_center_crop": True, "crop_size": {"height": height, "width": width}}
    if manifest.image_grid_pinpoints:
        canvases = [[height, width] for width, height in manifest.image_grid_pinpoints]
        return values | {"image_processor_type": "LlavaNextImageProcessor", "image_grid_pinpoints": canvases}
    return values | {"image_processor_type": "LlavaImageProcessor"}


def read_preprocessor(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the tower's own image processor settings of a model that we did not export."""
    tower_settings = {key: value for key, value in values.items() if key not in _PADDING}
    return {**tower_settings, "image_processor_type": "CLIPImageProcessor"}


def pixels_of(preprocessor: Mapping[str, Any]) -> tuple[int, int]:
    """Return height and width of an image processor's output. Raises ModelError if images keep different sizes."""
    size = preprocessor.get("crop_size") if preprocessor.get("do_center_crop") else preprocessor.get("size")
    if isinstance(size, int):
        return size, size
    if not isinstance(size, Mapping) or not {"height", "width"} <= size.keys():
        raise ModelError(f"the image processor has neither crop_size nor size with height and width (found {size}).")
    return int(size["height"]), int(size["width"])


def write_processor(
    settings: Mapping[str, Any], *, num_prefix_tokens: int, patch_size: int, image_token: str
) -> dict[str, Any]:
    """Return processor_config.json for the ``settings`` of config.json; it decides the number of image tokens."""
    return {
        "image_token": image_token,
        "num_additional_image_tokens": num_prefix_tokens,
        "patch_size": patch_size,
        "processor_class": _PROCESSORS[settings["model_type"]],
        "vision_feature_select_strategy": settings["vision_feature_select_strategy"],
    }


def _older_type(preprocessor: Mapping[str, Any]) -> str:
    # transformers 5 has a class per backend under one name, which used to be that of the Pillow one.
    kind = (
        preprocessor.get("image_processor_type") or preprocessor.get("feature_extractor_type") or "CLIPImageProcessor"
    )
    return str(kind).removesuffix("Pil").removesuffix("Fast")
