"""Preprocessed pixels as the model takes them; ``process_images`` keeps LLaVA's name."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from jaxtyping import Float32, UInt8
from PIL import Image
from torch import Tensor

from llava_ray.images.geometry import ImageProcessor, ImageSpec, crop_pixels, expand2square

__all__ = ["ImageSpec", "crop_pixels", "expand2square", "normalise", "process_images"]


class HasAspectRatio(Protocol):
    """A model's settings, as far as its images are concerned."""

    @property
    def image_aspect_ratio(self) -> str:
        """Return "square" or "pad"."""


def normalise(
    pixels: UInt8[Tensor, "n 3 h w"] | UInt8[np.ndarray, "n 3 h w"], spec: ImageSpec
) -> Float32[Tensor, "n 3 h w"]:
    """Rescale, subtract the mean and divide by the deviation, in fp32 on the pixels' own device."""
    values = torch.as_tensor(pixels).to(torch.float32) / (1 / spec.rescale_factor)
    mean, std = values.new_tensor(spec.mean), values.new_tensor(spec.std)
    return (values - mean[:, None, None]) / std[:, None, None]


def process_images(
    images: Sequence[Image.Image], image_processor: ImageProcessor, model_cfg: HasAspectRatio
) -> Float32[Tensor, "n 3 h w"]:
    """Preprocess images as the model was trained on them; n may be 0.

    Raises ConfigError for an unknown ``model_cfg.image_aspect_ratio``, ModelError for an unknown processor geometry.
    """
    spec = ImageSpec.from_processor(image_processor, model_cfg.image_aspect_ratio)
    pixels = np.empty((len(images), 3, spec.height, spec.width), np.uint8)
    for index, image in enumerate(images):
        pixels[index] = crop_pixels(image, spec)
    return normalise(pixels, spec)
