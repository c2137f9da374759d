"""One tower at several scales (S2, https://arxiv.org/abs/2403.13043): the same number of tokens, wider features.

The image is resized to each scale and cut into squares of the smallest one, which is the tower's input size; the
squares' features are merged, pooled to the grid of the smallest scale, and concatenated along channels.
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import interpolate


def extract_multiscale(
    extract: Callable[[Tensor], Tensor], pixel_values: Float[Tensor, "n 3 h w"], scales: Sequence[int]
) -> Float[Tensor, "n p c"]:
    """Compute features of all scales, those of the smallest first; ``extract`` maps squares to patches (m, p, v).

    The squares of all scales go through ``extract`` in one batch. Interpolation is in fp32, as in the original.
    """
    scales = sorted(scales)
    base = scales[0]
    chunks = [split_chessboard(_resized(pixel_values, scale), base) for scale in scales]
    features = extract(torch.cat(chunks)).split([len(chunk) for chunk in chunks])
    side = round(features[0].shape[1] ** 0.5)
    grids = [merge_chessboard(part, scale // base, side) for part, scale in zip(features, scales, strict=True)]
    pooled = [
        interpolate(grid.float(), size=(side, side), mode="area").to(grid.dtype) if grid.shape[-1] != side else grid
        for grid in grids
    ]
    return torch.cat(pooled, dim=1).flatten(2).transpose(1, 2)


def _resized(pixel_values: Float[Tensor, "n 3 h w"], side: int) -> Float[Tensor, "n 3 side side"]:
    """Resize the images; those of that size are returned unchanged."""
    if pixel_values.shape[-2:] == (side, side):
        return pixel_values
    return interpolate(pixel_values.float(), size=(side, side), mode="bicubic").to(pixel_values.dtype)


def split_chessboard(pixel_values: Float[Tensor, "n 3 h w"], side: int) -> Float[Tensor, "m 3 side side"]:
    """Cut each image into squares, row by row; those of one image are consecutive."""
    num_images, channels, height, width = pixel_values.shape
    squares = pixel_values.reshape(num_images, channels, height // side, side, width // side, side)
    return squares.permute(0, 2, 4, 1, 3, 5).reshape(-1, channels, side, side)


def merge_chessboard(features: Float[Tensor, "m p v"], num_squares: int, side: int) -> Float[Tensor, "n v h w"]:
    """Merge the patches of each image's ``num_squares`` x ``num_squares`` squares of ``side`` x ``side`` patches."""
    width = features.shape[-1]
    grid = features.reshape(-1, num_squares, num_squares, side, side, width)
    return grid.permute(0, 5, 1, 3, 2, 4).reshape(-1, width, num_squares * side, num_squares * side)
