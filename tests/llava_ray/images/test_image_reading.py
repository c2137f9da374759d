"""Files of every kind and every fault, read or refused by name."""

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import fsspec
import numpy as np
import pytest
from PIL import Image

from llava_ray.errors import DataError, ImageError
from llava_ray.images.reading import check_header, check_image, open_filesystem, open_image, read_bytes, to_rgb

LIMIT = 10_000_000


def photo(width: int = 37, height: int = 23, mode: str = "RGB") -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(values).convert(mode)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def bomb(width: int, height: int) -> bytes:
    """A valid PNG of a few hundred bytes that announces ``width`` x ``height`` pixels."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = zlib.compress(bytes(100_000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def refused(function: Callable[..., object], data: bytes, reason: str) -> str:
    with pytest.raises(ImageError) as caught:
        function(data, "photos/7.jpg", max_pixels=LIMIT)
    assert caught.value.reason == reason
    assert "photos/7.jpg" in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P"])
def test_opaque_modes_equal_pillows_own_conversion(mode: str) -> None:
    image = photo(mode=mode)
    opened = open_image(encoded(image, "PNG"), "x.png", max_pixels=LIMIT)
    assert opened.mode == "RGB"
    assert np.array_equal(np.asarray(opened), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "PPM"])
def test_every_format_is_read_and_measured(kind: str) -> None:
    data = encoded(photo(), kind)
    assert open_image(data, "x", max_pixels=LIMIT).size == (37, 23)
    assert check_image(data, "x", max_pixels=LIMIT) == (37, 23)


def test_cmyk_becomes_rgb() -> None:
    data = encoded(Image.new("CMYK", (8, 8), (255, 0, 0, 0)), "JPEG", quality=100)
    red, green, blue = open_image(data, "x.jpg", max_pixels=LIMIT).getpixel((4, 4))
    assert red < 10 and green > 245 and blue > 245


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    values = np.array([[0, 257, 32768, 65535]], np.uint16)
    data = encoded(Image.fromarray(values), "PNG")
    assert np.asarray(open_image(data, "x.png", max_pixels=LIMIT))[0, :, 0].tolist() == [0, 1, 128, 255]
    assert check_image(data, "x.png", max_pixels=LIMIT) == (4, 1)


def test_transparent_pixels_lie_on_white() -> None:
    image = Image.new("RGBA", (2, 1), (10, 20, 30, 255))
    image.putpixel((1, 0), (10, 20, 30, 0))
    opened = open_image(encoded(image, "PNG"), "x.png", max_pixels=LIMIT)
    assert [opened.getpixel((0, 0)), opened.getpixel((1, 0))] == [(10, 20, 30), (255, 255, 255)]
    grey = Image.new("LA", (1, 1), (100, 0))
    assert open_image(encoded(grey, "PNG"), "x.png", max_pixels=LIMIT).getpixel((0, 0)) == (255, 255, 255)


def test_transparent_palette_lies_on_white() -> None:
    image = Image.new("P", (1, 1), 0)
    image.putpalette([9, 9, 9])
    data = encoded(image, "GIF", transparency=0)
    assert open_image(data, "x.gif", max_pixels=LIMIT).getpixel((0, 0)) == (255, 255, 255)


def test_animation_gives_its_first_frame() -> None:
    first, second = Image.new("RGB", (4, 4), "red"), Image.new("RGB", (4, 4), "blue")
    data = encoded(first, "GIF", save_all=True, append_images=[second])
    assert open_image(data, "x.gif", max_pixels=LIMIT).getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("count", [1, 3, 5, 6, 9])
def test_frames_are_counted_up_to_a_bound(kind: str, count: int) -> None:
    frames = [Image.new("RGB", (4, 4), (20 * index, 0, 0)) for index in range(count)]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    if count <= 5:
        assert check_header(data, "x", max_pixels=LIMIT, max_frames=5) == (4, 4)
    else:
        with pytest.raises(ImageError, match="more than 5 frames") as caught:
            check_header(data, "x", max_pixels=LIMIT, max_frames=5)
        assert caught.value.reason == "image_too_many_frames"


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
def test_exif_orientation_is_applied(orientation: int, kind: str) -> None:
    image = Image.new("RGB", (32, 16), "white")
    image.paste("black", (0, 0, 8, 8))  # marks the stored top left corner
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(image, kind, exif=exif)
    opened = open_image(data, "x", max_pixels=LIMIT)
    corners = {1: (0, 0), 2: (1, 0), 3: (1, 1), 4: (0, 1), 5: (0, 0), 6: (1, 0), 7: (1, 1), 8: (0, 1)}
    assert opened.size == ((16, 32) if orientation >= 5 else (32, 16))
    assert check_image(data, "x", max_pixels=LIMIT) == opened.size
    x, y = corners[orientation]
    assert opened.getpixel((2 + x * (opened.width - 5), 2 + y * (opened.height - 5)))[0] < 60


ORIENTATION_AS_TEXT = (
    b"II*\x00\x08\x00\x00\x00\x01\x00\x12\x01\x02\x00\x08\x00\x00\x00\x1a\x00\x00\x00\x00\x00\x00\x00abcdefgh"
)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("exif", [b"garbage", b"II*\x00", ORIENTATION_AS_TEXT])
def test_broken_exif_does_not_cost_the_image(exif: bytes, kind: str) -> None:
    data = encoded(photo(), kind, exif=b"Exif\x00\x00" + exif)
    assert open_image(data, "x", max_pixels=LIMIT).size == (37, 23)
    assert check_image(data, "x", max_pixels=LIMIT) == (37, 23)


@pytest.mark.parametrize("function", [open_image, check_image])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "BMP"])
def test_truncated_file_is_refused(function: Callable[..., object], kind: str) -> None:
    data = encoded(photo(200, 200), kind)
    message = refused(function, data[: len(data) // 2], "image_truncated")
    assert "cut off or damaged" in message


def test_progressive_jpeg_without_its_last_scan_bytes_is_refused() -> None:
    data = encoded(photo(200, 200), "JPEG", progressive=True)
    refused(check_image, data[:-200], "image_truncated")


@pytest.mark.parametrize("function", [open_image, check_image])
def test_text_and_emptiness_are_no_images(function: Callable[..., object]) -> None:
    message = refused(function, b"<html>404 Not Found</html>", "image_unreadable")
    assert "<html>" in message and "JPEG" in message
    assert "empty" in refused(function, b"", "image_unreadable")


def test_postscript_is_never_interpreted() -> None:
    refused(open_image, b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "image_unreadable")


@pytest.mark.parametrize("function", [open_image, check_image])
@pytest.mark.parametrize("size", [(4000, 4000), (12_000, 10_000), (40_000, 25_000)])
def test_bomb_is_refused_from_its_header(
    function: Callable[..., object], size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[object] = []
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", decoded.append)
    message = refused(function, bomb(*size), "image_too_large")
    assert "10,000,000" in message and "data.max_image_pixels" in message
    assert not decoded


def test_modes_without_agreed_white_are_refused() -> None:
    data = encoded(Image.fromarray(np.array([[0.5, 1e6]], np.float32)), "TIFF")
    assert "mode 'F'" in refused(open_image, data, "image_unreadable")
    refused(check_image, data, "image_unreadable")


def test_to_rgb_leaves_rgb_alone() -> None:
    image = photo()
    assert to_rgb(image) is image


def test_bytes_come_from_paths_and_urls(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"abc")
    with fsspec.open("memory://pictures/b.bin", "wb") as file:
        file.write(b"def")
    assert read_bytes(str(tmp_path / "a.bin")) == b"abc"
    assert read_bytes(f"file://{tmp_path}/a.bin") == b"abc"
    assert read_bytes("memory://pictures/b.bin") == b"def"


@pytest.mark.parametrize("path", ["{}/none.jpg", "{}", "file://{}/none.jpg", "memory://pictures/none.jpg"])
def test_missing_file_is_named(path: str, tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"data\.image_folder") as caught:
        read_bytes(path.format(tmp_path))
    assert caught.value.reason == "image_missing"


class BrokenFileSystem(fsspec.AbstractFileSystem):
    protocol = "broken"

    def _open(self, path: str, mode: str = "rb", **options: object) -> io.BytesIO:
        raise OSError("connection reset")


def test_failing_storage_is_not_blamed_on_the_record() -> None:
    fsspec.register_implementation("broken", BrokenFileSystem, clobber=True)
    with pytest.raises(DataError, match="connection reset") as caught:
        read_bytes("broken://bucket/1.jpg")
    assert not isinstance(caught.value, ImageError)


def test_an_address_elsewhere_is_the_records_own_choice() -> None:
    fsspec.register_implementation("broken", BrokenFileSystem, clobber=True)
    for home in ("/images", "broken://other/images", "memory://bucket/images"):
        with pytest.raises(ImageError, match="connection reset") as caught:
            read_bytes("broken://bucket/1.jpg", home)
        assert caught.value.reason == "image_unreadable"
    with pytest.raises(DataError, match="start again when it does") as failed:
        read_bytes("broken://bucket/1.jpg", "broken://BUCKET/images")
    assert not isinstance(failed.value, ImageError)


ADDRESSES = [
    "ftp://nonexistent.invalid/a.jpg", "ftp://127.0.0.1:1/a.jpg", "webhdfs://127.0.0.1:1/a", "reference://x",
    "dir://a", "jupyter://127.0.0.1:1/a", "generic://x", "arrow_hdfs://x/a", "hf://datasets/x", "smb://x/a",
    "zip://a.zip", "simplecache://a", "data://x", "local://x", "file://", "blockcache://x", "git://x", "async_wrapper://x",
]  # fmt: skip


@pytest.mark.parametrize("address", ADDRESSES)
def test_an_address_that_nothing_can_come_of_is_one_images_fault(address: str) -> None:
    with pytest.raises(ImageError) as caught:
        read_bytes(address, "/images")
    assert caught.value.reason in ("image_unreadable", "image_missing")
    assert address in str(caught.value)


def test_an_image_folder_that_does_not_answer_is_no_images_fault() -> None:
    with pytest.raises(DataError, match="the storage did not answer") as caught:
        read_bytes("ftp://127.0.0.1:1/images/a.jpg", "ftp://127.0.0.1:1/images")
    assert not isinstance(caught.value, ImageError)


def test_unknown_scheme_is_refused() -> None:
    with pytest.raises(DataError, match=r"nosuch://bucket.*cannot be opened"):
        open_filesystem("nosuch://bucket/1.jpg")
