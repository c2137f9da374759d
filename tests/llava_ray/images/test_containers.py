"""Containers: what costs too much is refused at once; ordinary files of every format, mode and origin are read."""

import io
import struct
import time
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from hostile_images import (
    BOMBS,
    TAGS_OF_16_PIXELS,
    chunk,
    exif_jpeg,
    gif_with,
    jpeg_with,
    plain,
    png_with,
    tiff_of,
    webp_with,
)
from PIL import Image, ImageCms, PngImagePlugin

from llava_ray.errors import ImageError
from llava_ray.images.containers import identify_format
from llava_ray.images.reading import check_header, check_image, open_image

LIMIT = 50_000_000
ATTACK = Path(__file__).parents[2] / "attack"
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "AVIF", "PPM")
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "I;16", "I;16B", "I", "F")


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def noise(width: int = 40, height: int = 30, mode: str = "RGB") -> Image.Image:
    values = np.random.default_rng(1).integers(0, 256, (height, width, 3), np.uint8)
    if mode.startswith("I;16"):
        return Image.fromarray(values[..., 0].astype(np.uint16) * 257).convert(mode)
    return Image.fromarray(values).convert(mode if mode not in ("LA", "PA", "LAB") else "RGB")


@pytest.mark.parametrize("name", BOMBS)
def test_costly_files_are_refused_at_once(name: str) -> None:
    data = BOMBS[name]()
    assert len(data) <= 2**24 + 2**16
    check = open_image if name == "exif in png text" else check_header  # which only whoever turns it upright reads
    start = time.perf_counter()
    with pytest.raises(ImageError) as caught:
        check(data, "x.img", max_pixels=LIMIT)
    assert time.perf_counter() - start < 1
    tracemalloc.start()
    with pytest.raises(ImageError):
        check(data, "x.img", max_pixels=LIMIT)
    assert tracemalloc.get_traced_memory()[1] < 3 * len(data) + 2**24
    tracemalloc.stop()
    assert caught.value.reason == "image_too_costly"
    assert "x.img: more than" in str(caught.value)


@pytest.mark.parametrize("path", sorted(ATTACK.glob("img_*.bin")), ids=lambda path: path.stem)
def test_odd_files_are_read_or_refused_by_name(path: Path) -> None:
    for function in (check_header, check_image, open_image):
        try:
            function(path.read_bytes(), path.name, max_pixels=LIMIT)
        except ImageError as error:
            assert path.name in str(error)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", FORMATS)
def test_what_pillow_writes_is_read(kind: str, mode: str) -> None:
    try:
        data = encoded(noise(mode=mode), kind)
    except (OSError, ValueError, KeyError):
        pytest.skip(f"Pillow writes no {kind} of mode {mode}")
    assert identify_format(data) == kind
    assert check_header(data, "x", max_pixels=LIMIT, max_frames=1) == (40, 30)
    if mode == "F" or (kind, mode) == ("TIFF", "YCbCr"):  # no agreed white; Pillow cannot read what it wrote
        return
    assert check_image(data, "x", max_pixels=LIMIT) == (40, 30)
    assert open_image(data, "x", max_pixels=LIMIT).size == (40, 30)


OPTIONS: list[tuple[str, dict[str, object]]] = [
    ("JPEG", {"progressive": True}),
    ("JPEG", {"subsampling": 0, "quality": 100}),
    ("JPEG", {"restart_marker_rows": 1}),
    ("PNG", {"compress_level": 0}),
    ("PNG", {"bits": 4}),
    ("WEBP", {"lossless": True}),
    ("GIF", {"interlace": 1}),
    ("BMP", {}),
    ("TIFF", {"compression": "tiff_lzw"}),
    ("TIFF", {"compression": "tiff_adobe_deflate"}),
    ("TIFF", {"compression": "jpeg"}),
    ("TIFF", {"compression": "packbits"}),
    ("TIFF", {"big_tiff": True}),
    ("TIFF", {"strip_size": 120}),
    ("JPEG2000", {"tile_size": (16, 16)}),
    ("JPEG2000", {"no_jp2": True}),
    ("JPEG2000", {"codeblock_size": (32, 32), "precinct_size": (128, 128), "num_resolutions": 5}),
    ("JPEG2000", {"quality_layers": [40, 20, 10], "irreversible": True}),
    ("AVIF", {"quality": 30}),
]


@pytest.mark.parametrize(("kind", "options"), OPTIONS)
def test_what_pillow_writes_with_options_is_read(kind: str, options: dict[str, object]) -> None:
    image = noise(300, 200, "P" if "bits" in options else "RGB")
    assert open_image(encoded(image, kind, **options), "x", max_pixels=LIMIT).size == (300, 200)


def rich_exif() -> Image.Exif:
    """As a telephone writes it: text, fractions, a maker's own note, a place on the earth."""
    exif = Image.Exif()
    exif[271], exif[272], exif[305], exif[306] = "Maker", "Model", "Software 1.2", "2026:11:29 10:00:00"
    exif[282], exif[283], exif[296] = 72.0, 72.0, 2
    exif.get_ifd(34665).update(
        {33434: 0.01, 33437: 2.8, 34855: 100, 36867: "2026:11:29 10:00:00", 37500: bytes(20_000)}
    )
    exif.get_ifd(34665).update({37510: b"ASCII\0\0\0" + b"word " * 200, 42034: (24.0, 70.0, 2.8, 2.8)})
    exif.get_ifd(34853).update({1: "N", 2: (47.0, 22.0, 11.5), 3: "E", 4: (8.0, 33.0, 2.5)})
    return exif


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_ordinary_metadata_is_no_burden(kind: str) -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes() + bytes(600_000)
    options = {} if kind == "TIFF" else {"xmp": b"<x:xmpmeta>" + b"<rdf:li>word</rdf:li>" * 2000 + b"</x:xmpmeta>"}
    data = encoded(noise(), kind, exif=rich_exif(), icc_profile=profile, **options)
    assert open_image(data, "x", max_pixels=LIMIT).size == (40, 30)


def test_ordinary_texts_comments_and_thumbnails_are_no_burden() -> None:
    texts = PngImagePlugin.PngInfo()
    for number in range(10):
        texts.add_text(f"key {number}", "a workflow in JSON " * 5000, zip=number % 2 == 0)
        texts.add_itxt(f"other {number}", "märchen " * 1000)
    adobe = b"!\xff\x0bXMP DataXMP" + b"\x01" + bytes(range(255, -1, -1)) + b"\0"
    netscape = b"!\xff\x0bNETSCAPE2.0\3\1\0\0\0"
    files = [
        encoded(noise(), "PNG", pnginfo=texts),
        encoded(noise(), "GIF", comment=b"made by hand " * 2000),
        gif_with(netscape + adobe + b"!\xfe" + (b"\xff" + b"c" * 255) * 200 + b"\0" + b"!\x01\x0c" + bytes(12) + b"\0"),
        jpeg_with((0xE1, b"Exif\0\0" + rich_exif().tobytes()[6:]), *[(0xE2, b"ICC_PROFILE\0" + bytes(60_000))] * 20),
        exif_jpeg(rich_exif().tobytes()[6:] + bytes(200_000)),
        jpeg_with((0xFE, b"comment"), (0xED, b"Photoshop 3.0\x008BIM" + bytes(3000)), (0xEE, b"Adobe" + bytes(7))),
        webp_with(b"XMP ", b"<x/>"),
        b"P6\n# made by a program\n# of long ago\n2 1\n255\n" + b"#" * 6,
        b"P5 512 256 255 " + b"#" * (512 * 256),
        b"P1\n# plain\n4 2\n0 1 0 1\n1 0 1 0\n",
        encoded(noise(), "MPO", save_all=True, append_images=[noise(), noise()]),
    ]
    for data in files:
        assert open_image(data, "x", max_pixels=LIMIT).mode == "RGB"


def test_a_large_tiff_of_one_row_a_strip_is_read() -> None:
    height = 50_000
    strips = np.arange(height, dtype="<u4")
    start = 8 + 2 + 12 * 9 + 4
    entries = [
        (256, 4, 1, 3),
        (257, 4, 1, height),
        (258, 3, 1, 8),
        (259, 3, 1, 1),
        (262, 3, 1, 1),
        (273, 4, height, start),
        (277, 3, 1, 1),
        (278, 3, 1, 1),
        (279, 4, height, start + 4 * height),
    ]
    pixels = bytes(range(250)) * (3 * height // 250)
    offsets = (strips * 3 + start + 8 * height).astype("<u4").tobytes()
    data = tiff_of(entries, 0) + offsets + np.full(height, 3, "<u4").tobytes() + pixels
    opened = open_image(data, "x", max_pixels=LIMIT)
    assert opened.size == (3, height)
    assert [opened.getpixel((x, 5))[0] for x in range(3)] == [15, 16, 17]


def test_pages_in_a_loop_end() -> None:
    data = bytearray(tiff_of(TAGS_OF_16_PIXELS, 2048, following=8))
    struct.pack_into("<L", data, 8 + 2 + 12 * 5 + 8, 500)
    assert check_header(bytes(data), "x", max_pixels=LIMIT, max_frames=1) == (16, 16)
    assert open_image(bytes(data), "x", max_pixels=LIMIT).size == (16, 16)


def test_a_canvas_is_measured_before_libwebp_makes_room_for_it() -> None:
    data = bytearray(webp_with(b"XMP ", b""))
    data[24:30] = b"\xff\xff\0\xff\xff\0"
    with pytest.raises(ImageError) as caught:
        check_header(bytes(data), "x", max_pixels=LIMIT)
    assert caught.value.reason == "image_too_large"


def test_only_the_formats_that_are_named_are_opened() -> None:
    for data in (
        b"8BPS" + bytes(100),
        b"icns" + bytes(100),
        b"\0\0\1\0" + bytes(100),
        b"gimp xcf" + bytes(50),
        b"P7\n",
    ):
        assert identify_format(data) is None
        with pytest.raises(ImageError) as caught:
            check_header(data, "x", max_pixels=LIMIT)
        assert caught.value.reason == "image_unreadable"


def test_a_text_that_pillow_reads_as_exif_turns_the_image() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    text = b"\nexif\n    100\n" + exif.tobytes()[6:].hex().encode()
    data = png_with(chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(text)))
    assert open_image(data, "x", max_pixels=LIMIT).size == (16, 16)
    assert check_image(data, "x", max_pixels=LIMIT) == (16, 16)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "I;16"])
def test_bands_of_rows_equal_the_whole(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    image = noise(mode="I;16" if mode == "I;16" else "RGB")
    if mode in ("RGBA", "LA"):
        image.putalpha(Image.fromarray(np.random.default_rng(2).integers(0, 256, (30, 40), np.uint8)))
        image = image.convert(mode)
    options = {}
    if mode == "P":
        image, options = image.quantize(16), {"transparency": 3}
    data = encoded(image, "PNG", **options)
    whole = np.asarray(open_image(data, "x", max_pixels=LIMIT))
    monkeypatch.setattr("llava_ray.images.opening.BAND_PIXELS", 130)
    assert np.array_equal(np.asarray(open_image(data, "x", max_pixels=LIMIT)), whole)


@pytest.mark.parametrize(
    "error", [MemoryError(), RecursionError(), AssertionError(), OverflowError("x"), zlib.error("x")]
)
def test_whatever_a_decoder_raises_is_the_images_fault(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", fail)
    for function in (check_image, open_image):
        with pytest.raises(ImageError) as caught:
            function(plain(), "x", max_pixels=LIMIT)
        assert caught.value.reason == ("image_too_costly" if isinstance(error, MemoryError) else "image_truncated")
