"""Preprocessing: equal to the original's golden numbers and to transformers' own processors."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil, convert_image_to_patches

from llava_ray.errors import ConfigError, ModelError
from llava_ray.images.geometry import ImageProcessor, ImageSpec
from llava_ray.images.processing import crop_pixels, expand2square, normalize_pixels, process_images

GOLDEN = Path(__file__).parents[2] / "golden" / "v15_mlp_pad"
SIZES = [(64, 48), (48, 64), (50, 50), (333, 77), (31, 200), (20, 11), (1, 9)]

PROCESSORS = {
    "clip": CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
    "siglip": SiglipImageProcessorPil(size={"height": 40, "width": 36}),
    "dinov2": BitImageProcessorPil(size={"shortest_edge": 36}, crop_size={"height": 28, "width": 28}),
    "crop_larger": BitImageProcessorPil(size={"shortest_edge": 27}, crop_size={"height": 40, "width": 42}),
    "bilinear": CLIPImageProcessorPil(size={"shortest_edge": 31}, crop_size={"height": 30, "width": 31}, resample=2),
    "raw": SiglipImageProcessorPil(size={"height": 32, "width": 32}, do_normalize=False, do_rescale=False),
}


@dataclass(frozen=True)
class ModelSettings:
    image_aspect_ratio: str


def picture(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8))


@pytest.mark.parametrize("case", json.loads((GOLDEN / "expected.json").read_text())["generations"])
def test_padded_pixels_equal_the_originals(case: dict[str, object]) -> None:
    settings = json.loads((GOLDEN / "tower" / "preprocessor_config.json").read_text())
    image = Image.open(GOLDEN / "images" / str(case["image"]))
    pixels = process_images([image], CLIPImageProcessorPil(**settings), ModelSettings("pad"))
    assert list(pixels.shape) == case["pixel_shape"]
    assert pixels.mean().item() == pytest.approx(case["pixel_mean"], abs=1e-6)
    assert pixels.abs().sum().item() == pytest.approx(case["pixel_sum_abs"], rel=1e-6)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", PROCESSORS)
def test_square_equals_transformers(name: str, size: tuple[int, int]) -> None:
    processor = PROCESSORS[name]
    image = picture(*size)
    ours = process_images([image], processor, ModelSettings("square"))
    theirs = torch.as_tensor(np.stack(processor(image)["pixel_values"])).float()
    assert ours.shape == theirs.shape
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["clip", "siglip", "dinov2"])
def test_pad_equals_transformers_on_the_square_canvas(name: str, size: tuple[int, int]) -> None:
    processor = PROCESSORS[name]
    image = picture(*size)
    side = max(size)
    background = tuple(int(value * 255) for value in processor.image_mean)
    canvas = Image.new("RGB", (side, side), background)
    canvas.paste(image, ((side - size[0]) // 2, (side - size[1]) // 2))
    ours = process_images([image], processor, ModelSettings("pad"))
    assert torch.allclose(ours, torch.as_tensor(np.stack(processor(canvas)["pixel_values"])), rtol=0, atol=1e-6)


def test_siglip_2_for_any_aspect_ratio_gets_the_square_of_as_many_patches() -> None:
    processor = Siglip2ImageProcessorPil(patch_size=8, max_num_patches=20)
    image = picture(60, 60)
    ours = process_images([image], processor, ModelSettings("square"))
    assert ours.shape == (1, 3, 32, 32)
    theirs = processor(image)
    assert tuple(theirs["spatial_shapes"][0]) == (4, 4)
    patches = convert_image_to_patches(ours[0].numpy(), 8)
    assert np.allclose(patches, theirs["pixel_values"][0][:16], atol=1e-6)


def test_another_side_than_the_processors() -> None:
    for name, processor in PROCESSORS.items():
        spec = ImageSpec.from_processor(processor, "square", side=64)
        assert (spec.height, spec.width) == (64, 64), name


def test_clip_background_is_the_originals() -> None:
    assert ImageSpec.from_processor(CLIPImageProcessorPil(), "pad").background == (122, 116, 104)


def test_odd_pixel_of_padding_goes_right() -> None:
    square = expand2square(Image.new("RGB", (2, 5), "white"), (0, 0, 0))
    assert np.asarray(square)[0, :, 0].tolist() == [0, 255, 255, 0, 0]


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "CMYK"])
def test_any_mode_can_be_padded(mode: str) -> None:
    pixels = process_images([picture(10, 20).convert(mode)], PROCESSORS["clip"], ModelSettings("pad"))
    assert pixels.shape == (1, 3, 32, 32)


def test_no_images_give_an_empty_batch() -> None:
    assert process_images([], PROCESSORS["clip"], ModelSettings("pad")).shape == (0, 3, 32, 32)


def test_unknown_aspect_ratio_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'anyrez' is unknown; expected one of square, pad, anyres"):
        process_images([picture(4, 4)], PROCESSORS["clip"], ModelSettings("anyrez"))


@pytest.mark.parametrize(
    "processor",
    [
        CLIPImageProcessorPil(size={"shortest_edge": 32, "longest_edge": 64}),
        CLIPImageProcessorPil(size={"shortest_edge": 32}, do_center_crop=False),
        SiglipImageProcessorPil(do_resize=False),
    ],
)
def test_other_geometries_are_refused(processor: ImageProcessor) -> None:
    with pytest.raises(ModelError, match=r"shortest edge|no size"):
        ImageSpec.from_processor(processor, "square")


@pytest.mark.parametrize("name", PROCESSORS)
def test_spec_survives_json(name: str) -> None:
    spec = ImageSpec.from_processor(PROCESSORS[name], "pad")
    assert ImageSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


def test_normalise_takes_arrays_and_tensors() -> None:
    spec = ImageSpec.from_processor(PROCESSORS["clip"], "square")
    pixels = crop_pixels(picture(60, 40), spec)[None]
    assert pixels.dtype == np.uint8 and pixels.flags.c_contiguous
    assert torch.equal(normalize_pixels(pixels, spec), normalize_pixels(torch.from_numpy(pixels), spec))


@pytest.mark.parametrize("aspect_ratio", ["square", "pad"])
@pytest.mark.parametrize("size", [(1, 300_000), (300_000, 1), (3, 90_000)])
def test_thin_strips_do_not_explode(aspect_ratio: str, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    largest: list[int] = []
    resize, new = Image.Image.resize, Image.new

    def watched_resize(image: Image.Image, to: tuple[int, int], **options: object) -> Image.Image:
        largest.append(to[0] * to[1])
        return resize(image, to, **options)

    def watched_new(mode: str, to: tuple[int, int], colour: object = 0) -> Image.Image:
        largest.append(to[0] * to[1])
        return new(mode, to if to[0] * to[1] < 2e8 else (1, 1), colour)

    monkeypatch.setattr(Image.Image, "resize", watched_resize)
    monkeypatch.setattr(Image, "new", watched_new)
    spec = ImageSpec.from_processor(PROCESSORS["clip"], aspect_ratio)
    assert crop_pixels(Image.new("RGB", size, "red"), spec).shape == (3, 32, 32)
    assert max(largest) <= 178_956_970


def test_shortening_a_strip_changes_nothing_that_is_kept() -> None:
    spec = ImageSpec.from_processor(PROCESSORS["clip"], "square")
    strip = picture(32 * 24, 32)
    whole = np.asarray(PROCESSORS["clip"](strip, do_rescale=False, do_normalize=False)["pixel_values"][0])
    assert np.array_equal(crop_pixels(strip, spec), whole)
