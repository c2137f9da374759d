"""The positions of an image in a sequence, and the feature at each: computed before any model runs."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from jaxtyping import Int64

from llava_ray.errors import ConfigError
from llava_ray.images.anyres import Size, check_grid_pinpoints, get_anyres_image_grid_shape, unpadded_margins

_MERGE_TYPES = ("flat", "spatial", "spatial_unpad")
NEWLINE = -1  # an index that stands for the learned vector at the end of a row of patches


@dataclass(frozen=True)
class ImageTokens:
    """The rule of one model. A view is one input of the tower; without ``grid_pinpoints`` an image is one view.

    Feature indices of an image count view by view: in each view the prefix tokens first, then the patches row by row.
    """

    rows: int
    """Patches of a view from top to bottom."""
    columns: int
    """Patches of a view from left to right."""
    num_prefix: int = 0
    """Class and register tokens kept before the patches (``cls_patch``)."""
    merge_type: str = "flat"
    """LLaVA's mm_patch_merge_type; without effect on an image of one view."""
    grid_pinpoints: tuple[Size, ...] = ()
    """Canvases (width, height) of anyres."""
    side: int = 0
    """Side of a view in pixels; needed for anyres only."""

    def __post_init__(self) -> None:
        """Raise ConfigError for an invalid rule."""
        if self.merge_type not in _MERGE_TYPES:
            raise ConfigError(f"mm_patch_merge_type = {self.merge_type!r}; expected one of {', '.join(_MERGE_TYPES)}")
        if not self.grid_pinpoints:
            return
        check_grid_pinpoints(self.grid_pinpoints, self.side)
        if self.num_prefix and self.merge_type != "flat":
            raise ConfigError(
                f"mm_patch_merge_type = {self.merge_type!r} lays patches on a grid, where the {self.num_prefix} class "
                "and register tokens of a view have no place: set mm_vision_select_feature = 'patch', or merge 'flat'"
            )

    @property
    def num_features(self) -> int:
        """Count the features of one view."""
        return self.num_prefix + self.rows * self.columns

    @property
    def has_newline(self) -> bool:
        """Return whether the model has a learned vector for the ends of rows."""
        return self.merge_type == "spatial_unpad"

    @property
    def max_views(self) -> int:
        """Return the largest number of views of any image."""
        return 1 + max((w // self.side * (h // self.side) for w, h in self.grid_pinpoints), default=0)

    def num_views(self, width: int, height: int) -> int:
        """Count the views of an image of that size in pixels."""
        if not self.grid_pinpoints:
            return 1
        columns, rows = get_anyres_image_grid_shape((width, height), self.grid_pinpoints, self.side)
        return 1 + columns * rows

    def count(self, width: int, height: int) -> int:
        """Count the positions of an image of that size in pixels."""
        if not (self.grid_pinpoints and self.has_newline):
            return self.num_views(width, height) * self.num_features
        columns, rows, left, top = self._kept(width, height)
        return self.num_features + (rows - 2 * top) * (columns - 2 * left + 1)

    def arrange(self, image_sizes: Sequence[Size]) -> Int64[np.ndarray, " t"]:
        """Return the index of the feature at each image position, for several images with their features in order."""
        orders = []
        start = 0
        for width, height in image_sizes:
            order = _arranged(self, width, height)
            orders.append(np.where(order == NEWLINE, NEWLINE, order + start))
            start += self.num_views(width, height) * self.num_features
        return np.concatenate(orders) if orders else np.empty(0, np.int64)

    def _kept(self, width: int, height: int) -> tuple[int, int, int, int]:
        """Return the grid's columns and rows of patches, and the margins that unpadding removes."""
        views = get_anyres_image_grid_shape((width, height), self.grid_pinpoints, self.side)
        columns, rows = views[0] * self.columns, views[1] * self.rows
        return columns, rows, *unpadded_margins((width, height), (columns, rows))


@lru_cache(maxsize=1024)
def _arranged(tokens: ImageTokens, width: int, height: int) -> Int64[np.ndarray, " t"]:
    """Return the index of the feature at each position of one image, NEWLINE for the learned vector.

    ``spatial`` orders the view of the whole image first, then the canvas in reading order: row by row across all views.
    """
    features = np.arange(tokens.num_views(width, height) * tokens.num_features)
    if not tokens.grid_pinpoints or tokens.merge_type == "flat":
        return features
    base, tiles = np.split(features, [tokens.num_features])
    columns, rows, left, top = tokens._kept(width, height)
    shape = (rows // tokens.rows, columns // tokens.columns, tokens.rows, tokens.columns)
    grid = tiles.reshape(shape).transpose(0, 2, 1, 3).reshape(rows, columns)
    if tokens.has_newline:
        grid = grid[top : rows - top, left : columns - left]
        grid = np.pad(grid, ((0, 0), (0, 1)), constant_values=NEWLINE)
    return np.concatenate([base, grid.ravel()])
