"""Safe opening of images: known formats only, containers and sizes checked first, every mode converted to RGB."""

import io
from collections.abc import Callable
from functools import cache
from typing import TypeVar

import numpy as np
from PIL import Image, UnidentifiedImageError

from llava_ray.errors import ImageError
from llava_ray.images.containers import WorkBudget, identify_format, walk_container
from llava_ray.images.containers.tiff import walk_exif
from llava_ray.images.containers.webp import canvas_size

# Formats that Pillow decodes itself. Others may start programs (EPS runs Ghostscript) or are no raster images.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "AVIF", "PPM")

# Exif 2.32, tag 0x0112: the orientation of the stored rows and columns, and the transposition to upright.
_ORIENTATION_TAG = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = {5, 6, 7, 8}
_RAW_EXIF = "Raw profile type exif"  # a PNG text chunk that Pillow parses as Exif

# Modes whose samples are wider than 8 bits; Pillow's own conversion clips them instead of scaling.
_DEEP_MODES = {"I", "I;16", "I;16B", "I;16L", "I;16N", "F"}

BAND_PIXELS = 2**22  # converted at a time, so that a large image is in memory twice instead of five times

T = TypeVar("T")


def open_image(data: bytes, name: str, *, max_pixels: int) -> Image.Image:
    """Decode ``data`` to an upright RGB image; ``name`` identifies it in messages.

    The container is walked, and the header is checked against ``max_pixels``, before anything is decoded. The Exif
    orientation is applied, an animation gives its first frame, 16-bit grey is scaled to 8 bits, and transparent pixels
    are composed on white, as viewers show them. RGB, grey and opaque palette images equal Pillow's ``convert("RGB")``.

    Raises ImageError: ``image_too_large``, ``image_truncated``, ``image_unreadable`` or ``image_too_costly``.
    """
    return decode_image(open_header(data, name, max_pixels=max_pixels), name)


def check_image(data: bytes, name: str, *, max_pixels: int) -> tuple[int, int]:
    """Return the upright (width, height) after decoding the whole file as cheaply as its format allows.

    Raises what `open_image` raises for the same data.
    """
    return measure_image(open_header(data, name, max_pixels=max_pixels), name)


def check_header(data: bytes, name: str, *, max_pixels: int, max_frames: int | None = None) -> tuple[int, int]:
    """Return the (width, height) of the file's header, without decoding.

    Raises ImageError: ``image_too_large``, ``image_truncated``, ``image_unreadable``, ``image_too_costly`` or
    ``image_too_many_frames``.
    """
    return open_header(data, name, max_pixels=max_pixels, max_frames=max_frames).size


def open_header(data: bytes, name: str, *, max_pixels: int, max_frames: int | None = None) -> Image.Image:
    """Walk the container and read only the header; refuse an image that is too large or too costly to decode.

    Frames are counted where ``max_frames`` bounds them. Raises ImageError, as `check_header` says.
    """
    kind = identify_format(data)
    if kind not in _formats():
        raise _unidentified(data, name)
    # Before Pillow opens the file, since opening alone parses metadata and may allocate a canvas.
    container = walk_container(kind, data, name, max_frames or 1)
    if kind == "WEBP":
        _check_size(canvas_size(data), name, max_pixels)
    image = _guarded(lambda: _open_header(kind, data, name, max_pixels), name, len(data))
    _check_size(image.size, name, max_pixels)
    frames = max(container.num_frames, 1 if kind in ("GIF", "TIFF") else int(getattr(image, "n_frames", 1)))
    if max_frames is not None and frames > max_frames:
        raise ImageError(
            f"{name} has more than {max_frames} frames (max_image_frames); send one of them",
            reason="image_too_many_frames",
        )
    return image


def decode_image(image: Image.Image, name: str) -> Image.Image:
    """Decode an opened image to upright RGB. Raises ImageError."""
    return _guarded(lambda: _decode_upright(image, name), name)


def measure_image(image: Image.Image, name: str) -> tuple[int, int]:
    """Decode an opened image as cheaply as possible, and return its upright size. Raises ImageError."""
    return _guarded(lambda: _measure(image, name), name)


def to_rgb(image: Image.Image, name: str = "image") -> Image.Image:
    """Convert a decoded image of any mode to RGB; transparent pixels are composed on white.

    Raises ImageError with reason ``image_unreadable`` for a mode that has no agreed black and white.
    """
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    if image.mode in _DEEP_MODES:
        return _from_deep(image, name).convert("RGB")
    try:
        return _on_white(image) if image.has_transparency_data else image.convert("RGB")
    except ValueError as error:
        raise ImageError(
            f"{name}: mode {image.mode!r} cannot become RGB ({error}); save it as an RGB PNG or JPEG",
            reason="image_unreadable",
        ) from error


@cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(kind for kind in _FORMATS if kind in Image.OPEN)  # a Pillow without AVIF still reads the others


def _guarded(function: Callable[[], T], name: str, size: int | None = None) -> T:
    """Run a part of decoding, and convert any exception to an ImageError: the image is at fault."""
    try:
        return function()
    except ImageError:
        raise
    except MemoryError as error:
        raise ImageError(
            f"{name}: decoding it takes more memory than is allowed; scale it down", reason="image_too_costly"
        ) from error
    except Exception as error:  # decoders raise nearly any type on damaged data, even AssertionError
        raise _damaged(name, size, error) from error


def _open_header(kind: str, data: bytes, name: str, max_pixels: int) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data), formats=(kind,))
    except UnidentifiedImageError as error:
        raise ImageError(
            f"{name}: the file begins as a {kind}, but its header is damaged, or of a kind that Pillow does not "
            "read; save it again as a plain PNG or JPEG",
            reason="image_unreadable",
        ) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _too_large(name, str(error), max_pixels) from error


def _check_size(size: tuple[int, int], name: str, max_pixels: int) -> None:
    width, height = size
    if width * height > max_pixels:
        raise _too_large(name, f"{width} x {height} = {width * height:,} pixels", max_pixels)


def _decode_upright(image: Image.Image, name: str) -> Image.Image:
    image.load()
    upright = _UPRIGHT.get(_orientation(image, name))
    rgb = to_rgb(image, name)
    return rgb if upright is None else rgb.transpose(upright)


def _measure(image: Image.Image, name: str) -> tuple[int, int]:
    width, height = image.size
    if image.format in ("JPEG", "MPO"):
        # An eighth of the size, luminance only: every byte is still entropy-decoded, so a truncated file is detected.
        image.draft("L", (1, 1))
        image.load()
    else:
        image.load()
        width, height = image.size  # Pillow turns a TIFF upright while decoding
    if image.mode in _DEEP_MODES or image.mode == "LAB":
        to_rgb(image, name)
    return (height, width) if _orientation(image, name) in _SIDEWAYS else (width, height)


def _too_large(name: str, found: str, max_pixels: int) -> ImageError:
    return ImageError(
        f"{name}: {found}; at most {max_pixels:,} are read (data.max_image_pixels; Pillow itself stops at "
        f"{2 * (Image.MAX_IMAGE_PIXELS or max_pixels):,}). Scale the file down or drop the record",
        reason="image_too_large",
    )


def _unidentified(data: bytes, name: str) -> ImageError:
    found = f"{len(data)} bytes beginning {data[:8]!r}" if data else "an empty file"
    return ImageError(
        f"{name}: not an image of a known format ({found}); expected one of {', '.join(_formats())}",
        reason="image_unreadable",
    )


def _damaged(name: str, size: int | None, error: Exception) -> ImageError:
    where = "" if size is None else f" of {size:,} bytes"
    found = str(error)[:200] or type(error).__name__
    return ImageError(
        f"{name}: the file{where} is cut off or damaged ({found}); fetch it again", reason="image_truncated"
    )


def _orientation(image: Image.Image, name: str) -> int:
    try:
        raw = image.info.get(_RAW_EXIF)
        if isinstance(raw, str) and "exif" not in image.info:  # compressed, so the container's walk has not checked it
            walk_exif(bytes.fromhex("".join(raw.split("\n")[3:])), WorkBudget(name))
        return int(image.getexif().get(_ORIENTATION_TAG, 1))
    except ImageError:
        raise
    except Exception:  # noqa: BLE001 - a broken Exif block does not affect the pixels, whatever it raises
        return 1


def _on_white(image: Image.Image) -> Image.Image:
    """Compose a transparent image on white, some rows at a time."""
    whole = Image.new("RGB", image.size)
    rows = max(1, BAND_PIXELS // max(1, image.width))
    for top in range(0, image.height, rows):
        box = (0, top, image.width, min(top + rows, image.height))
        coloured = image.crop(box).convert("RGBA")
        whole.paste(Image.alpha_composite(Image.new("RGBA", coloured.size, "white"), coloured).convert("RGB"), box)
    return whole


def _from_deep(image: Image.Image, name: str) -> Image.Image:
    samples = np.asarray(image)
    if samples.dtype.kind == "f" or samples.min() < 0 or samples.max() > 65535:
        raise ImageError(
            f"{name}: samples of mode {image.mode!r} from {samples.min()} to {samples.max()} have no agreed black and "
            "white; save it with 8 or 16 bits a channel",
            reason="image_unreadable",
        )
    scaled = np.empty(samples.shape, np.uint8)
    rows = max(1, BAND_PIXELS // max(1, image.width))
    for top in range(0, image.height, rows):
        scaled[top : top + rows] = (samples[top : top + rows].astype(np.uint32) * 255 + 32767) // 65535
    return Image.fromarray(scaled)
