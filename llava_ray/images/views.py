"""One-step conversion of an encoded image to the pixels of a model's views."""

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from PIL import Image

from llava_ray.images.anyres import Size
from llava_ray.images.geometry import ImageSpec, crop_views
from llava_ray.images.opening import open_image


@dataclass(frozen=True)
class OpenedImage:
    """A decoded image in the form that a model takes."""

    size: Size
    """Size of the whole upright image."""
    pixels: np.ndarray[Any, np.dtype[np.uint8]]
    """Pixels of its views (v, 3, h, w), or without a spec of the whole image (h, w, 3)."""


@runtime_checkable
class ImageDecoder(Protocol):
    """A decoder of the images of an engine's requests that does not block its event loop."""

    async def open_views(self, data: bytes, name: str, *, max_pixels: int, spec: ImageSpec | None) -> OpenedImage:
        """Decode an image and cut it into ``spec``'s views; leave it whole for None. Raises ImageError."""
        ...


def open_views(data: bytes, name: str, *, max_pixels: int, spec: ImageSpec | None) -> OpenedImage:
    """Decode an image and cut it into ``spec``'s views; leave it whole for None. Raises ImageError."""
    return cut_views(open_image(data, name, max_pixels=max_pixels), spec)


def cut_views(image: Image.Image, spec: ImageSpec | None) -> OpenedImage:
    """Cut an upright RGB image into ``spec``'s views; leave it whole for None."""
    return OpenedImage(image.size, np.asarray(image) if spec is None else crop_views(image, spec))
