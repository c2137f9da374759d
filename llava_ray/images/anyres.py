"""LLaVA-1.6's anyres: an image as one resized view of the whole plus views of the tower's size cut from a canvas.

Names and rounding are the original's (llava/mm_utils.py, llava/model/llava_arch.py at c121f04). Sizes are (width,
height) in pixels.
"""

import ast
import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from llava_ray.errors import ConfigError

Size = tuple[int, int]


def default_grid_pinpoints(side: int) -> tuple[Size, ...]:
    """Return the canvases of LLaVA-1.6 for views of ``side`` pixels: up to 2 x 2, 3 x 1 and 1 x 3 views."""
    return tuple((columns * side, rows * side) for columns, rows in ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3)))


def read_grid_pinpoints(value: str | Sequence[Sequence[int]]) -> tuple[Size, ...]:
    """Parse a config's image_grid_pinpoints: a list of (width, height), or its text. Raises ConfigError."""
    try:
        pairs = ast.literal_eval(value) if isinstance(value, str) else value
        return tuple((int(width), int(height)) for width, height in pairs)
    except (ValueError, TypeError, SyntaxError) as error:
        raise ConfigError(
            f"image_grid_pinpoints = {value!r} cannot be read ({error}); expected pairs of pixels such as "
            "[[336, 672], [672, 336]]"
        ) from error


def check_grid_pinpoints(grid_pinpoints: Sequence[Size], side: int) -> None:
    """Raise ConfigError unless every canvas consists of whole views."""
    if not grid_pinpoints:
        raise ConfigError("image_grid_pinpoints is empty; anyres needs at least one canvas (width, height)")
    for width, height in grid_pinpoints:
        if width <= 0 or height <= 0 or width % side or height % side:
            raise ConfigError(
                f"image_grid_pinpoints has {width} x {height}, but the tower's views are {side} x {side} pixels; "
                f"expected multiples of {side} such as {default_grid_pinpoints(side)}"
            )


@lru_cache(maxsize=4096)
def select_best_resolution(original_size: Size, possible_resolutions: tuple[Size, ...]) -> Size:
    """Select the canvas that keeps most of an image's pixels; of equal ones that with the least waste, then the first.

    More pixels than the image's own count as no gain.
    """
    original_width, original_height = original_size

    def quality(resolution: Size) -> Size:
        width, height = resolution
        scale = min(width / original_width, height / original_height)
        scaled = int(original_width * scale) * int(original_height * scale)
        effective = min(scaled, original_width * original_height)
        return effective, effective - width * height

    return max(possible_resolutions, key=quality)


def get_anyres_image_grid_shape(image_size: Size, grid_pinpoints: tuple[Size, ...], patch_size: int) -> Size:
    """Return the columns and rows of views of ``patch_size`` pixels on an image's canvas."""
    width, height = select_best_resolution(image_size, grid_pinpoints)
    return width // patch_size, height // patch_size


def letterboxed_size(original_size: Size, target_resolution: Size) -> Size:
    """Return an image's size on its canvas: one side fits exactly, the other is rounded up."""
    original_width, original_height = original_size
    target_width, target_height = target_resolution
    scale_w, scale_h = target_width / original_width, target_height / original_height
    if scale_w < scale_h:
        return target_width, min(math.ceil(original_height * scale_w), target_height)
    return min(math.ceil(original_width * scale_h), target_width), target_height


def unpadded_margins(original_size: Size, current_size: Size) -> Size:
    """Return the columns and rows to crop from either edge of a letterboxed image's grid; one of them is 0.

    ``current_size`` is the grid's (columns, rows). The rest may be a row more than the image covers, as in the
    original, or empty for an extreme strip.
    """
    original_width, original_height = original_size
    width, height = current_size
    if original_width / original_height > width / height:
        return 0, (height - int(original_height * (width / original_width))) // 2
    return (width - int(original_width * (height / original_height))) // 2, 0


def crop_anyres(
    image: Image.Image, grid_pinpoints: tuple[Size, ...], side: int, resample: Image.Resampling
) -> UInt8[np.ndarray, "v 3 side side"]:
    """Cut an RGB image into views: first the whole image resized to one, then its canvas row by row.

    The canvas is black where the image does not cover it.
    """
    width, height = select_best_resolution(image.size, grid_pinpoints)
    fitted_width, fitted_height = letterboxed_size(image.size, (width, height))
    canvas = np.zeros((height, width, 3), np.uint8)
    left, top = (width - fitted_width) // 2, (height - fitted_height) // 2
    fitted = np.asarray(image.resize((fitted_width, fitted_height), resample))
    canvas[top : top + fitted_height, left : left + fitted_width] = fitted
    rows, columns = height // side, width // side
    views = np.empty((1 + rows * columns, 3, side, side), np.uint8)
    views[0] = np.asarray(image.resize((side, side), resample)).transpose(2, 0, 1)
    tiles = canvas.reshape(rows, side, columns, side, 3).transpose(0, 2, 4, 1, 3)
    views[1:].reshape(rows, columns, 3, side, side)[...] = tiles
    return views
