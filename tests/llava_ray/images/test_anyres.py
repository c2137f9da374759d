"""anyres: canvases, views and counts are the original's, by its golden numbers and by a slow reading of its code."""

import itertools
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil

from llava_ray.errors import ConfigError, ModelError
from llava_ray.images.anyres import (
    default_grid_pinpoints,
    letterboxed_size,
    read_grid_pinpoints,
    select_best_resolution,
)
from llava_ray.images.geometry import ImageSpec, crop_views
from llava_ray.images.processing import process_images
from llava_ray.images.tokens import NEWLINE, ImageTokens

GOLDEN = Path(__file__).parents[2] / "golden" / "v16_anyres"
PINPOINTS = default_grid_pinpoints(336)
UNPAD = ImageTokens(24, 24, merge_type="spatial_unpad", grid_pinpoints=PINPOINTS, side=336)

# Worked by hand through the original's arithmetic.
WORKED = {
    (672, 672): 2928,
    (1000, 1000): 2928,
    (640, 480): 2340,
    (480, 640): 2352,
    (1024, 899): 2634,
    (899, 1024): 2640,
    (1920, 1080): 1948,
    (1080, 1920): 1968,
    (2000, 500): 1890,
    (500, 2000): 1944,
    (3000, 300): 1160,
    (300, 200): 976,
    (336, 336): 1176,
}
# Strips, single pixels, canvases themselves and whatever chance brings.
SIZES = [
    *WORKED,
    (1, 1),
    (1, 100_000),
    (100_000, 1),
    (5000, 3),
    (336, 672),
    (1008, 336),
    *[(int(w), int(h)) for w, h in np.random.default_rng(0).integers(1, 3000, (12, 2))],
]


@dataclass(frozen=True)
class ModelSettings:
    image_aspect_ratio: str
    image_grid_pinpoints: object


def picture(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8))


def golden_processor() -> CLIPImageProcessorPil:
    return CLIPImageProcessorPil(**json.loads((GOLDEN / "tower" / "preprocessor_config.json").read_text()))


@pytest.mark.parametrize(("size", "count"), WORKED.items())
def test_worked_token_counts(size: tuple[int, int], count: int) -> None:
    assert UNPAD.count(*size) == count


@pytest.mark.parametrize(
    ("size", "canvas", "views"),
    [
        ((672, 672), (672, 672), 5),
        ((1000, 1000), (672, 672), 5),
        ((2000, 500), (1008, 336), 4),
        ((500, 2000), (336, 1008), 4),
        ((300, 200), (336, 672), 3),  # nothing is gained beyond its own pixels: least waste, then the first listed
        ((336, 336), (336, 672), 3),
    ],
)
def test_canvas_and_views(size: tuple[int, int], canvas: tuple[int, int], views: int) -> None:
    assert select_best_resolution(size, PINPOINTS) == canvas
    assert UNPAD.num_views(*size) == views <= UNPAD.max_views == 5


def chosen_slowly(size: tuple[int, int]) -> tuple[int, int]:
    """The original's loop."""
    best, most, least = None, 0, math.inf
    for width, height in PINPOINTS:
        scale = min(width / size[0], height / size[1])
        effective = min(int(size[0] * scale) * int(size[1] * scale), size[0] * size[1])
        wasted = width * height - effective
        if effective > most or (effective == most and wasted < least):
            best, most, least = (width, height), effective, wasted
    assert best is not None
    return best


def merged_slowly(tokens: ImageTokens, size: tuple[int, int]) -> list[int]:
    """The original's tensor operations, on features that are their own numbers, one channel wide."""
    canvas = chosen_slowly(size)
    columns, rows = canvas[0] // tokens.side, canvas[1] // tokens.side
    per_view = tokens.num_prefix + tokens.rows * tokens.columns
    features = torch.arange((1 + columns * rows) * per_view).view(1 + columns * rows, per_view, 1)
    if tokens.merge_type == "flat":
        return features.flatten().tolist()
    base, tiles = features[0], features[1:].view(rows, columns, tokens.rows, tokens.columns, 1)
    if tokens.merge_type == "spatial":
        return torch.cat([base, tiles.permute(0, 2, 1, 3, 4).flatten(0, 3)]).flatten().tolist()
    grid = tiles.permute(4, 0, 2, 1, 3).flatten(1, 2).flatten(2, 3)
    height, width = grid.shape[1:]
    if size[0] / size[1] > width / height:
        margin = (height - int(size[1] * (width / size[0]))) // 2
        grid = grid[:, margin : height - margin, :]
    else:
        margin = (width - int(size[0] * (height / size[1]))) // 2
        grid = grid[:, :, margin : width - margin]
    newline = torch.full((*grid.shape[:-1], 1), NEWLINE)
    return torch.cat([base, torch.cat([grid, newline], -1).flatten(1, 2).transpose(0, 1)]).flatten().tolist()


@pytest.mark.parametrize("merge_type", ["flat", "spatial", "spatial_unpad"])
@pytest.mark.parametrize("size", SIZES)
def test_arrangement_is_the_originals(size: tuple[int, int], merge_type: str) -> None:
    tokens = ImageTokens(24, 24, merge_type=merge_type, grid_pinpoints=PINPOINTS, side=336)
    expected = merged_slowly(tokens, size)
    assert tokens.arrange([size]).tolist() == expected
    assert tokens.count(*size) == len(expected)


def test_several_images_count_their_features_on() -> None:
    sizes = [(640, 480), (30, 20), (3000, 300)]
    expected, start = [], 0
    for size in sizes:
        expected += [index if index == NEWLINE else index + start for index in merged_slowly(UNPAD, size)]
        start += UNPAD.num_views(*size) * 576
    assert UNPAD.arrange(sizes).tolist() == expected
    assert UNPAD.arrange([]).tolist() == []


def test_without_anyres_an_image_is_one_view_whatever_its_size() -> None:
    tokens = ImageTokens(4, 3, num_prefix=5, merge_type="spatial_unpad")
    assert {tokens.count(*size) for size in SIZES} == {17}
    assert tokens.max_views == 1
    assert tokens.arrange([(3, 4), (5, 6)]).tolist() == list(range(34))


def cut_slowly(image: Image.Image, canvas: tuple[int, int], side: int) -> np.ndarray:
    """The original's views: the image squashed, then its canvas cut row by row."""
    scale_w, scale_h = canvas[0] / image.width, canvas[1] / image.height
    if scale_w < scale_h:
        size = canvas[0], min(math.ceil(image.height * scale_w), canvas[1])
    else:
        size = min(math.ceil(image.width * scale_h), canvas[0]), canvas[1]
    padded = Image.new("RGB", canvas, (0, 0, 0))
    padded.paste(image.resize(size), ((canvas[0] - size[0]) // 2, (canvas[1] - size[1]) // 2))
    corners = itertools.product(range(0, canvas[1], side), range(0, canvas[0], side))
    views = [image.resize((side, side)), *(padded.crop((x, y, x + side, y + side)) for y, x in corners)]
    return np.stack([np.asarray(view).transpose(2, 0, 1) for view in views])


@pytest.mark.parametrize("size", [(40, 30), (33, 77), (90, 20), (15, 15), (1, 80), (301, 7)])
def test_views_are_the_originals(size: tuple[int, int]) -> None:
    spec = ImageSpec.from_processor(golden_processor(), "anyres")
    image = picture(*size)
    canvas = select_best_resolution(size, spec.grid_pinpoints)
    assert np.array_equal(crop_views(image, spec), cut_slowly(image, canvas, 56))


@pytest.mark.parametrize("case", json.loads((GOLDEN / "expected.json").read_text())["generations"])
def test_pixels_equal_the_originals(case: dict[str, object]) -> None:
    # The golden numbers were made with Pillow 13, which resizes first along the side where that is cheaper; earlier
    # ones always begin with the rows, and so round single pixels of two of the eight images otherwise.
    pinpoints = json.loads((GOLDEN / "config.json").read_text())["image_grid_pinpoints"]
    image = Image.open(GOLDEN / "images" / str(case["image"]))
    for written in (pinpoints, str(pinpoints)):
        pixels = process_images([image], golden_processor(), ModelSettings("anyres", written))
        assert list(pixels.shape) == case["pixel_shape"]
        assert pixels.mean().item() == pytest.approx(case["pixel_mean"], abs=1e-5)
        assert pixels.abs().sum().item() == pytest.approx(case["pixel_sum_abs"], rel=2e-5)


def test_images_of_different_height_come_as_a_list_as_in_the_original() -> None:
    settings = ModelSettings("anyres", None)
    wide, square = picture(200, 50), picture(112, 112)
    stacks = process_images([wide, square], golden_processor(), settings)
    assert [tuple(stack.shape) for stack in stacks] == [(4, 3, 56, 56), (5, 3, 56, 56)]
    assert process_images([square, square], golden_processor(), settings).shape == (2, 5, 3, 56, 56)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK"])
def test_any_mode_can_be_cut(mode: str) -> None:
    spec = ImageSpec.from_processor(golden_processor(), "anyres")
    assert crop_views(picture(30, 20).convert(mode), spec).shape == (3, 3, 56, 56)


def test_a_strip_costs_no_more_than_its_canvas(monkeypatch: pytest.MonkeyPatch) -> None:
    largest: list[int] = []
    resize = Image.Image.resize

    def watched(image: Image.Image, to: tuple[int, int], *options: object) -> Image.Image:
        largest.append(to[0] * to[1])
        return resize(image, to, *options)

    monkeypatch.setattr(Image.Image, "resize", watched)
    spec = ImageSpec.from_processor(golden_processor(), "anyres")
    for size in ((1, 300_000), (300_000, 1)):
        assert crop_views(Image.new("RGB", size), spec).shape[1:] == (3, 56, 56)
    assert max(largest) <= 112 * 112


def test_one_side_fits_and_the_other_is_rounded_up() -> None:
    assert letterboxed_size((1000, 333), (672, 672)) == (672, 224)
    assert letterboxed_size((333, 1000), (672, 672)) == (224, 672)
    assert letterboxed_size((1000, 1000), (672, 672)) == (672, 672)


@pytest.mark.parametrize("pinpoints", [[(336, 500)], [(0, 336)], []])
def test_canvases_of_broken_views_are_refused(pinpoints: list[tuple[int, int]]) -> None:
    with pytest.raises(ConfigError, match=r"image_grid_pinpoints (has|is empty).*(multiples of 56|at least one)"):
        ImageSpec.from_processor(golden_processor(), "anyres", grid_pinpoints=pinpoints)


@pytest.mark.parametrize("written", ["[(336, 672", "[1, 2]", [(1, 2, 3)], "[('a', 'b')]"])
def test_canvases_that_cannot_be_read(written: object) -> None:
    with pytest.raises(ConfigError, match=r"image_grid_pinpoints = .* cannot be read"):
        read_grid_pinpoints(written)


def test_class_tokens_have_no_place_on_a_grid() -> None:
    with pytest.raises(ConfigError, match="set mm_vision_select_feature = 'patch', or merge 'flat'"):
        ImageTokens(24, 24, 1, "spatial_unpad", PINPOINTS, 336)
    assert ImageTokens(24, 24, 1, "flat", PINPOINTS, 336).count(672, 672) == 5 * 577


def test_views_must_be_square() -> None:
    processor = CLIPImageProcessorPil(size={"height": 40, "width": 36}, do_center_crop=False)
    with pytest.raises(ModelError, match="36 x 40 pixels, but anyres cuts images into squares"):
        ImageSpec.from_processor(processor, "anyres")


def test_spec_with_canvases_survives_json() -> None:
    spec = ImageSpec.from_processor(golden_processor(), "anyres")
    assert ImageSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
