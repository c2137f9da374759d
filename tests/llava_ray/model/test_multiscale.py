"""S2: features of several scales side by side, as a slow reading of the published algorithm has them."""

import fakes
import pytest
import torch
from torch.nn.functional import interpolate

from llava_ray.errors import ConfigError, ModelError
from llava_ray.model.blueprint import read_blueprint
from llava_ray.model.formats.tower_loading import load_vision_tower
from llava_ray.model.network.multiscale import merge_chessboard, split_chessboard

SIDE = fakes.IMAGE_SIZE
GRID = SIDE // fakes.PATCH


@torch.no_grad()
def slow_multiscale(tower, pixels: torch.Tensor, scales: list[int]) -> torch.Tensor:
    """One image, one scale and one chunk at a time."""
    features = []
    for image in pixels:
        parts = []
        for scale in scales:
            large = (
                interpolate(image[None], size=(scale, scale), mode="bicubic")[0] if scale != image.shape[1] else image
            )
            count = scale // SIDE
            grid = torch.zeros(fakes.TOWER_WIDTH, count * GRID, count * GRID)
            for row in range(count):
                for column in range(count):
                    chunk = large[:, row * SIDE : (row + 1) * SIDE, column * SIDE : (column + 1) * SIDE]
                    patches = tower(chunk[None])[0].T.reshape(fakes.TOWER_WIDTH, GRID, GRID)
                    grid[:, row * GRID : (row + 1) * GRID, column * GRID : (column + 1) * GRID] = patches
            pooled = grid.reshape(fakes.TOWER_WIDTH, GRID, count, GRID, count).mean((2, 4))
            parts.append(pooled.flatten(1).T)
        features.append(torch.cat(parts, dim=1))
    return torch.stack(features)


@pytest.mark.parametrize("kind", fakes.TOWERS)
def test_features_of_all_scales_lie_side_by_side(kind: str, folders) -> None:
    options = {"select_layer": -2, "select_feature": "patch"}
    single = load_vision_tower(folders.tower(kind), **options)
    tower = load_vision_tower(folders.tower(kind), s2_scales=(3 * SIDE, SIDE, 2 * SIDE), **options)
    pixels = torch.randn(2, 3, 3 * SIDE, 3 * SIDE, generator=torch.Generator().manual_seed(0))
    features = tower(pixels)
    assert features.shape == (2, GRID * GRID, tower.hidden_size) == (2, GRID * GRID, 3 * fakes.TOWER_WIDTH)
    expected = slow_multiscale(single, pixels, [SIDE, 2 * SIDE, 3 * SIDE])
    torch.testing.assert_close(features, expected, rtol=0, atol=1e-5)


def test_all_chunks_go_through_the_tower_together(folders) -> None:
    tower = load_vision_tower(
        folders.tower(), select_layer=-2, select_feature="patch", s2_scales=(SIDE, 2 * SIDE, 3 * SIDE)
    )
    seen = []
    tower.backbone.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["pixel_values"].shape[0]), with_kwargs=True
    )
    tower(torch.randn(2, 3, 3 * SIDE, 3 * SIDE))
    assert seen == [2 * (1 + 4 + 9)]


def test_splitting_and_merging_keep_places() -> None:
    pixels = torch.arange(2 * 3 * 4 * 4.0).reshape(2, 3, 4, 4)
    squares = split_chessboard(pixels, 2)
    assert torch.equal(squares[1], pixels[0, :, :2, 2:])
    assert torch.equal(squares[6], pixels[1, :, 2:, :2])
    assert torch.equal(merge_chessboard(squares.flatten(2).transpose(1, 2), 2, 2), pixels)


def test_blueprint_makes_pixels_of_the_largest_scale_and_as_many_tokens(folders) -> None:
    plain = read_blueprint(folders.config(), "pad")
    wide = read_blueprint(folders.config(s2=True), "pad")
    assert (wide.image_spec.height, wide.image_spec.width) == (3 * SIDE, 3 * SIDE)
    assert wide.s2_scales == (SIDE, 2 * SIDE, 3 * SIDE)
    assert wide.image_tokens.count(9, 9) == plain.image_tokens.count(9, 9) == GRID * GRID
    assert wide.mm_hidden_size == 3 * plain.mm_hidden_size
    two = read_blueprint(folders.config(s2=True, s2_scales=(SIDE, 2 * SIDE), mm_vision_select_layer=(-1, -2)), "square")
    assert (two.image_spec.height, two.mm_hidden_size) == (2 * SIDE, 4 * plain.mm_hidden_size)


def test_anyres_views_are_of_the_largest_scale(folders) -> None:
    blueprint = read_blueprint(folders.config(s2=True, s2_scales=(SIDE, 2 * SIDE)), "anyres")
    assert blueprint.image_spec.grid_pinpoints[0] == (2 * SIDE, 4 * SIDE)
    assert blueprint.image_tokens.count(2 * SIDE, 4 * SIDE) == 3 * GRID * GRID


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"s2_scales": (32,)}, "no effect without s2"),
        ({"s2": True, "s2_scales": (32, 50)}, "expected multiples of the smallest"),
        ({"s2": True, "mm_vision_select_feature": "cls_patch"}, "keeps no class token"),
    ],
)
def test_scales_that_make_no_grid_are_refused(settings: dict[str, object], message: str, folders) -> None:
    with pytest.raises(ConfigError, match=message):
        folders.config(**settings)


def test_smallest_scale_must_be_the_towers(folders) -> None:
    with pytest.raises(ModelError, match=r"makes 16 x 16 pixels, but the tower takes 32 x 32.*model\.s2_scales"):
        read_blueprint(folders.config(s2=True, s2_scales=(16, 32)), "pad")
    assert read_blueprint(folders.config(tower="dinov2", s2=True, s2_scales=(16, 32)), "pad").image_tokens.rows == 2
