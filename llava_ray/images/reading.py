"""Image files opened safely: known formats only, sizes checked before decoding, every mode brought to RGB."""

import io
import struct
from functools import cache
from pathlib import Path

import fsspec
import fsspec.core
import numpy as np
import pyarrow
import pyarrow.fs
from fsspec.implementations.arrow import ArrowFSWrapper
from PIL import Image, UnidentifiedImageError

from llava_ray.errors import DataError, ImageError

# Formats that Pillow decodes itself. Others may start programs (EPS runs Ghostscript) or hold no raster image.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "AVIF", "PPM")

# Exif 2.32, tag 0x0112: how the stored rows and columns lie, and what turns them upright.
ORIENTATION_TAG = 0x0112
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SIDEWAYS = {5, 6, 7, 8}

# Modes whose samples are wider than 8 bits; Pillow's own conversion clips them instead of scaling.
DEEP_MODES = {"I", "I;16", "I;16B", "I;16L", "I;16N", "F"}

# What Pillow's decoders raise on damaged data.
DECODING_ERRORS = (OSError, SyntaxError, ValueError, IndexError, KeyError, TypeError, EOFError, struct.error)


def open_filesystem(path: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """Return the filesystem of a local path or URL, and the path on it.

    fsspec's drivers come first (s3fs, gcsfs, ...); where one is not installed, pyarrow's own S3, GCS, Azure and HDFS
    serve. Raises DataError for a scheme that neither knows.
    """
    scheme, _, rest = path.partition("://")
    if not rest:
        return fsspec.filesystem("file"), str(Path(path).expanduser().absolute())
    try:
        filesystem, place = fsspec.core.url_to_fs(path)
    except (ImportError, ValueError) as error:
        root, _, below = rest.partition("/")
        filesystem, start = _arrow_filesystem(f"{scheme}://{root}", str(error))
        return filesystem, f"{start}/{below}" if below else start
    return filesystem, str(place)


@cache
def _arrow_filesystem(root: str, problem: str) -> tuple[fsspec.AbstractFileSystem, str]:
    try:
        filesystem, start = pyarrow.fs.FileSystem.from_uri(root)
    except (pyarrow.ArrowInvalid, pyarrow.ArrowNotImplementedError, OSError) as error:
        raise DataError(
            f"{root}: cannot be opened: {problem}; pyarrow: {error}. Check the address, or install the package named"
        ) from error
    return ArrowFSWrapper(filesystem), start.rstrip("/")


def read_bytes(path: str) -> bytes:
    """Read a file from a local path or any fsspec URL.

    Raises ImageError with reason ``image_missing`` where there is no such file and ``image_unreadable`` where it may
    not be read; DataError where the storage itself fails, which is no fault of the record.
    """
    try:
        if "://" not in path:
            return Path(path).read_bytes()
        filesystem, place = open_filesystem(path)
        return bytes(filesystem.cat_file(place))
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise ImageError(
            f"image {path!r} does not exist; check data.image_folder, or fetch the file", reason="image_missing"
        ) from error
    except PermissionError as error:
        raise ImageError(
            f"image {path!r} may not be read ({error}); give this user read permission", reason="image_unreadable"
        ) from error
    except OSError as error:
        raise DataError(
            f"reading image {path!r} failed ({error}): the storage did not answer; start again when it does, "
            "finished shards are kept"
        ) from error


def open_image(data: bytes, name: str, *, max_pixels: int) -> Image.Image:
    """Decode ``data`` to an upright RGB image; ``name`` is what messages call it.

    The header is checked against ``max_pixels`` before anything is decoded. The Exif orientation is applied, an
    animation gives its first frame, 16-bit grey is scaled to 8 bits, and transparent pixels are laid on white, as a
    viewer shows them. RGB, grey and opaque palette images equal Pillow's ``convert("RGB")``.

    Raises ImageError: ``image_too_large``, ``image_truncated`` or ``image_unreadable``.
    """
    image = _open(data, name, max_pixels)
    _decode(image, name)
    upright = UPRIGHT.get(_orientation(image))
    rgb = to_rgb(image, name)
    return rgb if upright is None else rgb.transpose(upright)


def check_image(data: bytes, name: str, *, max_pixels: int) -> tuple[int, int]:
    """Return the upright (width, height) after decoding the whole file as cheaply as its format allows.

    Raises what `open_image` raises for the same data.
    """
    image = _open(data, name, max_pixels)
    width, height = image.size
    if image.format in ("JPEG", "MPO"):
        # An eighth of the size, luminance only: every byte is still entropy-decoded, so a cut file is noticed.
        image.draft("L", (1, 1))
        _decode(image, name)
    else:
        _decode(image, name)
        width, height = image.size  # TIFF turns itself upright while decoding
    if image.mode in DEEP_MODES or image.mode == "LAB":
        to_rgb(image, name)
    return (height, width) if _orientation(image) in SIDEWAYS else (width, height)


def check_header(data: bytes, name: str, *, max_pixels: int) -> tuple[int, int]:
    """Return (width, height) as the file's header has them; nothing is decoded.

    Raises ImageError: ``image_too_large``, ``image_truncated`` or ``image_unreadable``.
    """
    return _open(data, name, max_pixels).size


def to_rgb(image: Image.Image, name: str = "image") -> Image.Image:
    """Bring a decoded image of any mode to RGB; transparent pixels are laid on white.

    Raises ImageError with reason ``image_unreadable`` for a mode that has no agreed black and white.
    """
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    if image.mode in DEEP_MODES:
        return _from_deep(image, name).convert("RGB")
    try:
        if image.has_transparency_data:
            coloured = image.convert("RGBA")
            return Image.alpha_composite(Image.new("RGBA", image.size, "white"), coloured).convert("RGB")
        return image.convert("RGB")
    except ValueError as error:
        raise ImageError(
            f"{name}: mode {image.mode!r} cannot become RGB ({error}); save it as an RGB PNG or JPEG",
            reason="image_unreadable",
        ) from error


@cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(kind for kind in FORMATS if kind in Image.OPEN)  # a Pillow without AVIF still reads the others


def _open(data: bytes, name: str, max_pixels: int) -> Image.Image:
    """Read the header, nothing more, and refuse what is too large to decode."""
    try:
        image = Image.open(io.BytesIO(data), formats=_formats())
    except UnidentifiedImageError as error:
        found = f"{len(data)} bytes beginning {data[:8]!r}" if data else "an empty file"
        raise ImageError(
            f"{name}: not an image of a known format ({found}); expected one of {', '.join(_formats())}",
            reason="image_unreadable",
        ) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _too_large(name, str(error), max_pixels) from error
    except DECODING_ERRORS as error:
        raise _damaged(name, len(data), error) from error
    width, height = image.size
    if width * height > max_pixels:
        raise _too_large(name, f"{width} x {height} = {width * height:,} pixels", max_pixels)
    return image


def _decode(image: Image.Image, name: str) -> None:
    try:
        image.load()
    except DECODING_ERRORS as error:
        raise _damaged(name, None, error) from error


def _too_large(name: str, found: str, max_pixels: int) -> ImageError:
    return ImageError(
        f"{name}: {found}; at most {max_pixels:,} are read (data.max_image_pixels; Pillow itself stops at "
        f"{2 * (Image.MAX_IMAGE_PIXELS or max_pixels):,}). Scale the file down or drop the record",
        reason="image_too_large",
    )


def _damaged(name: str, size: int | None, error: Exception) -> ImageError:
    where = "" if size is None else f" of {size:,} bytes"
    return ImageError(
        f"{name}: the file{where} is cut off or damaged ({error}); fetch it again", reason="image_truncated"
    )


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ORIENTATION_TAG, 1))
    except DECODING_ERRORS:
        return 1  # a broken Exif block does not make the pixels any worse


def _from_deep(image: Image.Image, name: str) -> Image.Image:
    samples = np.asarray(image)
    if samples.dtype.kind == "f" or samples.min() < 0 or samples.max() > 65535:
        raise ImageError(
            f"{name}: samples of mode {image.mode!r} from {samples.min()} to {samples.max()} have no agreed black and "
            "white; save it with 8 or 16 bits a channel",
            reason="image_unreadable",
        )
    scaled = (samples.astype(np.uint32) * 255 + 32767) // 65535
    return Image.fromarray(scaled.astype(np.uint8))
