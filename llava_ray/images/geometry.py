"""Preprocessing of images to the pixels of a vision tower; without torch, so that decoding tasks start fast."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import isqrt, sqrt
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from llava_ray.errors import ConfigError, ModelError
from llava_ray.images.anyres import Size, check_grid_pinpoints, crop_anyres, default_grid_pinpoints
from llava_ray.images.opening import to_rgb

_ASPECT_RATIOS = ("square", "pad", "anyres")

# Bounds for extreme strips, which would cost far more memory than they have content: 1 x 100,000 pixels resized by the
# short edge to 336, or padded to a square, become billions of pixels.
_MAX_ELONGATION = 16
_MAX_CANVAS_PIXELS = 178_956_970


@runtime_checkable
class ImageProcessor(Protocol):
    """The part of a transformers image processor that is used here: its settings."""

    def to_dict(self) -> dict[str, Any]:
        """Return the settings that preprocessor_config.json holds."""


@dataclass(frozen=True)
class ImageSpec:
    """All steps of a vision tower's image processor, as values."""

    shortest_edge: int | None
    """Length of the shorter side after resizing; None resizes to ``resize_height`` x ``resize_width``."""
    resize_height: int | None
    resize_width: int | None
    crop_height: int | None
    """Size of the centre crop after resizing; None keeps the resized image."""
    crop_width: int | None
    mean: tuple[float, float, float]
    """Mean per channel, on the 0..1 scale."""
    std: tuple[float, float, float]
    resample: int
    """Pillow's number of the resampling filter, 3 for bicubic."""
    rescale_factor: float
    aspect_ratio: str
    """LLaVA's image_aspect_ratio: "square", "pad" or "anyres"."""
    grid_pinpoints: tuple[Size, ...] = ()
    """Canvases (width, height) of anyres, from which the best is selected for each image."""

    def __post_init__(self) -> None:
        """Reject an unknown aspect ratio (the original treated it as "square"), variable sizes and invalid canvases."""
        if self.aspect_ratio not in _ASPECT_RATIOS:
            raise ConfigError(
                f"image_aspect_ratio = {self.aspect_ratio!r} is unknown; expected one of {', '.join(_ASPECT_RATIOS)}"
            )
        if not (self.crop_height and self.crop_width) and not (self.resize_height and self.resize_width):
            raise ModelError(
                f"the image processor resizes to {self._resize_words()} without a centre crop, so images keep "
                "different sizes; a tower needs one size: set crop_size, or size with height and width"
            )
        if self.aspect_ratio != "anyres":
            return
        if self.height != self.width:
            raise ModelError(
                f"the tower takes {self.width} x {self.height} pixels, but anyres cuts images into squares; "
                "set image_aspect_ratio = 'pad' or 'square', or choose a tower that takes squares"
            )
        check_grid_pinpoints(self.grid_pinpoints, self.height)

    @classmethod
    def from_processor(
        cls,
        image_processor: ImageProcessor,
        aspect_ratio: str,
        *,
        grid_pinpoints: Sequence[Size] | None = None,
        side: int | None = None,
    ) -> "ImageSpec":
        """Build the spec of a transformers image processor (CLIP, SigLIP, SigLIP 2, DINOv2's BiT and similar ones).

        ``grid_pinpoints`` are the canvases of anyres, by default LLaVA-1.6's; ``side`` overrides
        the size of the result (S2 needs its largest scale). Raises ModelError for an unsupported geometry, ConfigError
        for an unknown ``aspect_ratio`` or invalid canvases.
        """
        settings = image_processor.to_dict()
        size = _given(settings.get("size")) if settings.get("do_resize", True) else {}
        crop = _given(settings.get("crop_size")) if settings.get("do_center_crop") else {}
        if settings.get("max_num_patches"):  # SigLIP 2 for any aspect ratio: use the square of as many patches
            size = dict.fromkeys(("height", "width"), isqrt(settings["max_num_patches"]) * settings["patch_size"])
        unknown = (set(size) | set(crop)) - {"shortest_edge", "height", "width"}
        if unknown or settings.get("do_pad"):
            raise ModelError(
                f"image processor {settings.get('image_processor_type')!r} has size {size}, crop_size {crop}, "
                f"do_pad {settings.get('do_pad')}; expected resizing to a shortest edge or to height and width, "
                "with or without a centre crop, as CLIP, SigLIP and DINOv2 do"
            )
        normalises = settings.get("do_normalize", True)
        if side is not None:
            size, crop = dict.fromkeys(size, side), dict.fromkeys(crop, side)
        view = crop.get("height") or size.get("height") or 0
        grid = default_grid_pinpoints(view) if grid_pinpoints is None else grid_pinpoints
        return cls(
            shortest_edge=size.get("shortest_edge"),
            resize_height=size.get("height"),
            resize_width=size.get("width"),
            crop_height=crop.get("height"),
            crop_width=crop.get("width"),
            mean=_triple(settings["image_mean"]) if normalises else (0.0, 0.0, 0.0),
            std=_triple(settings["image_std"]) if normalises else (1.0, 1.0, 1.0),
            resample=int(settings["resample"]),
            rescale_factor=float(settings["rescale_factor"]) if settings.get("do_rescale", True) else 1.0,
            aspect_ratio=aspect_ratio,
            grid_pinpoints=_sizes(grid) if aspect_ratio == "anyres" else (),
        )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ImageSpec":
        """Build a spec from the values of `to_dict`, also after a round trip through JSON."""
        tuples = {"mean": _triple(values["mean"]), "std": _triple(values["std"])}
        return cls(**{**values, **tuples, "grid_pinpoints": _sizes(values["grid_pinpoints"])})

    def to_dict(self) -> dict[str, Any]:
        """Convert to plain values for JSON."""
        return asdict(self)

    @property
    def height(self) -> int:
        """Return the height of the result in pixels."""
        return self.crop_height or self.resize_height or 0

    @property
    def width(self) -> int:
        """Return the width of the result in pixels."""
        return self.crop_width or self.resize_width or 0

    @property
    def background(self) -> tuple[int, int, int]:
        """Return the colour of padding, 0..255: the mean, rounded down as in the original."""
        red, green, blue = (int(value * 255) for value in self.mean)
        return red, green, blue

    def _resize_words(self) -> str:
        return f"a shortest edge of {self.shortest_edge}" if self.shortest_edge else "no size"


def expand2square(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """Pad an image to a square of its longer side, centred; an odd pixel goes to the right or the bottom."""
    width, height = image.size
    if width == height:
        return image
    side = max(width, height)
    square = Image.new(image.mode, (side, side), background)
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


def crop_views(image: Image.Image, spec: ImageSpec) -> UInt8[np.ndarray, "v 3 h w"]:
    """Cut an image into the tower's views: one, or with anyres several (see `anyres.crop_anyres`).

    Views have spec.height x spec.width pixels of 8 bits; rescaling and normalising happen on the device, which keeps
    what is sent between processes four times smaller than floats.
    """
    if spec.aspect_ratio != "anyres":
        return crop_pixels(image, spec)[None]
    return crop_anyres(to_rgb(image), spec.grid_pinpoints, spec.height, Image.Resampling(spec.resample))


def crop_pixels(image: Image.Image, spec: ImageSpec) -> UInt8[np.ndarray, "3 h w"]:
    """Return the single view of an image: padded for "pad", resized and cropped bit for bit as transformers does.

    ``spec.aspect_ratio`` is "square" or "pad".
    """
    image = to_rgb(image)
    if spec.aspect_ratio == "pad":
        image = expand2square(_bounded(image), spec.background)
    pixels = np.asarray(_resized(image, spec))
    if spec.crop_height and spec.crop_width:
        pixels = _centre(pixels, spec.crop_height, spec.crop_width)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _resized(image: Image.Image, spec: ImageSpec) -> Image.Image:
    if spec.shortest_edge:
        image = _shortened(image)
        width, height = image.size
        # The longer side is rounded down in transformers' order of operations: other orders differ by a pixel.
        if width <= height:
            size = (spec.shortest_edge, int(spec.shortest_edge * height / width))
        else:
            size = (int(spec.shortest_edge * width / height), spec.shortest_edge)
    elif spec.resize_height and spec.resize_width:
        size = (spec.resize_width, spec.resize_height)
    else:
        return image
    return image.resize(size, resample=Image.Resampling(spec.resample))


def _centre(pixels: UInt8[np.ndarray, "h w 3"], height: int, width: int) -> UInt8[np.ndarray, "height width 3"]:
    """Crop the centre; a smaller image is padded with black."""
    missing = [max(0, height - pixels.shape[0]), max(0, width - pixels.shape[1])]
    if any(missing):
        before = [-(-gap // 2) for gap in missing]
        pixels = np.pad(pixels, [*((b, gap - b) for b, gap in zip(before, missing, strict=True)), (0, 0)])
    top, left = (pixels.shape[0] - height) // 2, (pixels.shape[1] - width) // 2
    return pixels[top : top + height, left : left + width]


def _shortened(image: Image.Image) -> Image.Image:
    """Crop the far ends of a strip, which the centre crop would drop after resizing."""
    width, height = image.size
    limit = _MAX_ELONGATION * min(width, height)
    if max(width, height) <= limit:
        return image
    left, top = max(0, (width - limit) // 2), max(0, (height - limit) // 2)
    return image.crop((left, top, left + min(width, limit), top + min(height, limit)))


def _bounded(image: Image.Image) -> Image.Image:
    """Shrink an image whose padded square would not fit into memory, by whole factors, to at least one pixel."""
    width, height = image.size
    factor = -int(-max(width, height) // sqrt(_MAX_CANVAS_PIXELS))
    return image if factor <= 1 else image.reduce((min(factor, width), min(factor, height)))


def _given(size: Mapping[str, Any] | None) -> dict[str, int]:
    return {key: int(value) for key, value in (size or {}).items() if value is not None}


def _sizes(values: Sequence[Sequence[int]]) -> tuple[Size, ...]:
    return tuple((int(width), int(height)) for width, height in values)


def _triple(values: Any) -> tuple[float, float, float]:
    red, green, blue = (float(value) for value in values)
    return red, green, blue
