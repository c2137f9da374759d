"""The preprocessing of a model's images and the number of their tokens, from settings and configs alone."""

from transformers import PreTrainedConfig

from llava_ray.config.model import ModelConfig
from llava_ray.errors import ModelError
from llava_ray.images.geometry import ImageProcessor, ImageSpec
from llava_ray.images.tokens import ImageTokens
from llava_ray.model.network.tower_families import find_family


def read_image_geometry(
    config: ModelConfig,
    image_aspect_ratio: str,
    tower_config: PreTrainedConfig,
    image_processor: ImageProcessor,
) -> tuple[ImageSpec, ImageTokens]:
    """Return the preprocessing of images to pixels, and the rule of their positions.

    Raises ModelError or ConfigError where the settings, the image processor and the tower do not fit together.
    """
    scales = find_s2_scales(config, image_processor)
    spec = ImageSpec.from_processor(
        image_processor,
        image_aspect_ratio,
        grid_pinpoints=config.image_grid_pinpoints,
        side=max(scales, default=None),
    )
    height, width = (min(scales), min(scales)) if scales else (spec.height, spec.width)
    _check_image_size(tower_config, height, width)
    family, patch_size = find_family(tower_config), int(tower_config.patch_size)
    tokens = ImageTokens(
        rows=height // patch_size,
        columns=width // patch_size,
        num_prefix=family.num_prefix_tokens(tower_config) if config.mm_vision_select_feature == "cls_patch" else 0,
        merge_type=config.mm_patch_merge_type,
        grid_pinpoints=spec.grid_pinpoints,
        side=spec.height,
    )
    return spec, tokens


def find_s2_scales(config: ModelConfig, image_processor: ImageProcessor) -> tuple[int, ...]:
    """Return the configured scales, by default once to three times the tower's size; () without S2.

    Raises ModelError if the tower takes no squares.
    """
    if not config.s2 or config.s2_scales is not None:
        return choose_s2_scales(config)
    own = ImageSpec.from_processor(image_processor, "square")
    if own.height != own.width:
        raise ModelError(
            f"the image processor makes {own.width} x {own.height} pixels, but s2 needs squares; set model.s2_scales"
        )
    return choose_s2_scales(config, own.height)


def choose_s2_scales(config: ModelConfig, side: int = 0) -> tuple[int, ...]:
    """Return the scales, smallest first; () without S2. ``side`` is the tower's own, where the config names none."""
    if not config.s2:
        return ()
    return tuple(sorted(config.s2_scales or (side, 2 * side, 3 * side)))


def _check_image_size(config: PreTrainedConfig, height: int, width: int) -> None:
    """Raise ModelError if preprocessed images have another size than the tower takes."""
    family, name = find_family(config), config.name_or_path or "the vision tower"
    if family.fixed_size and (height, width) != (config.image_size, config.image_size):
        raise ModelError(
            f"the image processor of {name} makes {height} x {width} pixels, but the tower takes {config.image_size} x "
            f"{config.image_size}; fix crop_size or size in preprocessor_config.json, or model.s2_scales."
        )
    if family.patchified and (height % config.patch_size or width % config.patch_size):
        raise ModelError(
            f"the image processor of {name} makes {height} x {width} pixels, but the tower takes whole patches of "
            f"{config.patch_size} pixels; fix size in preprocessor_config.json, or model.s2_scales."
        )
