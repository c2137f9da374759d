"""From an encoded image to the pixels that a model takes of it, in one step."""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from PIL import Image

from llava_ray.images.anyres import Size
from llava_ray.images.geometry import ImageSpec, crop_views
from llava_ray.images.opening import open_image


@dataclass(frozen=True)
class OpenedImage:
    """A decoded image as a model takes it."""

    size: Size
    """The whole image's, upright."""
    pixels: np.ndarray[Any, np.dtype[np.uint8]]
    """(v, 3, h, w): its views; or (h, w, 3): all of it, where no spec was given."""


class ImageDecoder(Protocol):
    """Opens the images of an engine's requests, without holding its event loop up."""

    async def open_views(self, data: bytes, name: str, *, max_pixels: int, spec: ImageSpec | None) -> OpenedImage:
        """Decode an image and cut it into ``spec``'s views; leave it whole for None. Raises ImageError."""
        ...


def open_views(data: bytes, name: str, *, max_pixels: int, spec: ImageSpec | None) -> OpenedImage:
    """Decode an image and cut it into ``spec``'s views; leave it whole for None. Raises ImageError."""
    return cut_views(open_image(data, name, max_pixels=max_pixels), spec)


def cut_views(image: Image.Image, spec: ImageSpec | None) -> OpenedImage:
    """Return an upright RGB image as a model takes it."""
    return OpenedImage(image.size, np.asarray(image) if spec is None else crop_views(image, spec))
