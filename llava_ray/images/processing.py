"""Normalised pixels for the model; ``process_images`` has LLaVA's own name."""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float32, UInt8
from PIL import Image
from torch import Tensor

from llava_ray.images.anyres import read_grid_pinpoints
from llava_ray.images.geometry import ImageProcessor, ImageSpec, crop_pixels, crop_views, expand2square

__all__ = ["ImageSpec", "crop_pixels", "crop_views", "expand2square", "normalize_pixels", "process_images"]


@runtime_checkable
class HasAspectRatio(Protocol):
    """A model's settings of image preprocessing."""

    @property
    def image_aspect_ratio(self) -> str:
        """Return "square", "pad" or "anyres"."""


@runtime_checkable
class HasGridPinpoints(HasAspectRatio, Protocol):
    """The same settings, with the canvases of anyres."""

    @property
    def image_grid_pinpoints(self) -> Any:
        """Return the canvases (width, height), or the text of such a list, as some of LLaVA's configs have it."""


def normalize_pixels(
    pixels: UInt8[Tensor, "n 3 h w"] | UInt8[np.ndarray, "n 3 h w"], spec: ImageSpec
) -> Float32[Tensor, "n 3 h w"]:
    """Rescale, subtract the mean and divide by the standard deviation, in fp32 on the pixels' own device."""
    values = torch.as_tensor(pixels).to(torch.float32) / (1 / spec.rescale_factor)
    mean, std = values.new_tensor(spec.mean), values.new_tensor(spec.std)
    return (values - mean[:, None, None]) / std[:, None, None]


def process_images(
    images: Sequence[Image.Image], image_processor: ImageProcessor, model_cfg: HasAspectRatio
) -> Float32[Tensor, "n 3 h w"] | Float32[Tensor, "n v 3 h w"] | list[Float32[Tensor, "_ 3 h w"]]:
    """Preprocess images as the model was trained on them; n may be 0.

    With anyres, each image is a stack of views, and stacks of different height are returned as a list, as in the
    original. Raises ConfigError for an unknown ``model_cfg.image_aspect_ratio`` or impossible canvases, ModelError for
    an unknown processor geometry.
    """
    pinpoints = model_cfg.image_grid_pinpoints if isinstance(model_cfg, HasGridPinpoints) else None
    spec = ImageSpec.from_processor(
        image_processor,
        model_cfg.image_aspect_ratio,
        grid_pinpoints=read_grid_pinpoints(pinpoints) if pinpoints else None,
    )
    if spec.aspect_ratio == "anyres":
        stacks = [normalize_pixels(crop_views(image, spec), spec) for image in images]
        return torch.stack(stacks) if len({len(stack) for stack in stacks}) == 1 else stacks
    pixels = np.empty((len(images), 3, spec.height, spec.width), np.uint8)
    for index, image in enumerate(images):
        pixels[index] = crop_pixels(image, spec)
    return normalize_pixels(pixels, spec)
