"""Images made from numbers: valid files of every format, changed where their readers look."""

import functools
import io
import random
import struct
import zlib
from collections.abc import Callable

import numpy as np
from hostile_images import (
    TAGS_OF_16_PIXELS,
    avif_extents,
    chunk,
    codestream,
    exif_jpeg,
    gif_comment,
    gif_with,
    jp2_of,
    jpeg_with,
    png_with,
    progressive_scans,
    tiff_behind_pointers,
    tiff_of,
    tiff_one_payload,
    tiff_same_tag,
    webp_with,
)
from PIL import Image

SIDES = ((40, 30), (1, 1), (16, 70), (3, 200))
NUMBERS = (
    0,
    1,
    2,
    3,
    4,
    7,
    8,
    15,
    16,
    127,
    128,
    255,
    256,
    32767,
    32768,
    65535,
    65536,
    2**24,
    2**31 - 1,
    2**31,
    2**32 - 1,
)
# Of TIFF's and Exif's directories: what Pillow and libtiff decide by.
TAGS = (254, 256, 257, 258, 259, 262, 266, 270, 273, 274, 277, 278, 279, 282, 284, 296, 317, 320, 322, 323, 324, 325)
MORE_TAGS = (330, 338, 339, 347, 512, 513, 530, 532, 700, 33432, 33723, 34377, 34665, 34675, 34853, 37500, 40965, 45057)


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@functools.cache
def originals() -> tuple[bytes, ...]:
    """Valid files of all formats, in several modes and encodings, with and without metadata and more pictures."""
    draw = np.random.default_rng(0)
    pictures = [
        Image.fromarray(draw.integers(0, 256, (height, width, 3), np.uint8)).resize((width, height))
        for width, height in SIDES
    ]
    exif = Image.Exif()
    exif[0x0112], exif[271], exif[282] = 6, "Maker", 72.0
    exif.get_ifd(34853).update({1: "N", 2: (47.0, 22.0, 11.5)})
    rich = {"exif": exif, "icc_profile": bytes(500), "xmp": b"<x tiff:Orientation='3'/>"}
    recipes: list[tuple[str, str, dict[str, object]]] = [
        *[("JPEG", mode, {"quality": 60}) for mode in ("RGB", "L", "CMYK")],
        ("JPEG", "RGB", {"progressive": True, **rich}),
        *[("PNG", mode, {}) for mode in ("1", "L", "P", "RGB", "RGBA")],
        ("PNG", "RGB", rich),
        ("WEBP", "RGB", {}),
        ("WEBP", "RGBA", {"lossless": True, **rich}),
        *[("GIF", mode, {}) for mode in ("L", "P", "RGBA")],
        *[("BMP", mode, {}) for mode in ("1", "L", "P", "RGB", "RGBA")],
        *[("TIFF", mode, {}) for mode in ("1", "L", "P", "RGB", "RGBA", "CMYK", "LAB", "I", "F")],
        *[
            ("TIFF", "RGB", {"compression": name})
            for name in ("tiff_lzw", "tiff_deflate", "jpeg", "packbits", "lzma", "zstd")
        ],
        ("TIFF", "1", {"compression": "group4"}),
        ("TIFF", "RGB", {"big_tiff": True, "exif": exif}),
        ("JPEG2000", "RGB", {}),
        ("JPEG2000", "RGBA", {"no_jp2": True}),
        ("JPEG2000", "L", {"tile_size": (16, 16)}),
        ("AVIF", "RGB", {"speed": 10}),
        ("AVIF", "RGBA", {"speed": 10, **rich}),
        *[("PPM", mode, {}) for mode in ("1", "L", "RGB", "I")],
    ]
    files = []
    for number, (kind, mode, options) in enumerate(recipes):
        by_way = pictures[number % len(pictures)]
        image = by_way.convert("RGB").convert(mode) if mode != "LAB" else by_way
        files.append(saved(image, kind, **options))
    several = {"save_all": True, "append_images": [pictures[0].rotate(180), pictures[0].rotate(180)]}
    files += [saved(pictures[0], kind, **several) for kind in ("GIF", "PNG", "WEBP", "TIFF", "AVIF", "MPO")]
    files += [
        b"P3 3 2 99\n" + b"1 22 33 " * 6,
        b"P1\n3 2\n010\n101\n",
        b"P2 2 2 5000 1 2 3 4",
        b"Pf 2 1 -1.0\n" + bytes(8),
    ]
    return tuple(files)


def make_image(seed: int) -> bytes:
    """Return the file of a number: a valid one mutated a few times, or a construction of many small parts."""
    rng = random.Random(seed)
    if rng.random() < 0.15:
        data = rng.choice(CONSTRUCTIONS)(rng)
        mutations = rng.choice([0, 0, 1])
    else:
        data = rng.choice(originals())
        mutations = rng.choice([0, 1, 1, 1, 2, 2, 3, 5])
    for _ in range(mutations):
        data = rng.choice(MUTATIONS)(rng, data)
    return data


def flip_bytes(rng: random.Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.randint(1, 8)):
        changed[place_in(rng, changed)] = rng.randrange(256)
    return bytes(changed)


def place_in(rng: random.Random, data: bytes | bytearray) -> int:
    """A place, most often near the beginning, where the numbers are that decide."""
    end = min(len(data), rng.choice([48, 128, 512, 2**30]))
    return rng.randrange(min(rng.choice([0, 4, 8, 12, 12, 12]), end - 1), end) if end > 1 else 0


def set_number(rng: random.Random, data: bytes) -> bytes:
    """Put a number on the edge of something somewhere, in 1, 2, 4 or 8 bytes and either order."""
    size, number = rng.choice([1, 2, 2, 4, 4, 8]), rng.choice(NUMBERS) + rng.choice([-1, 0, 0, 1])
    encoded = (number % 256**size).to_bytes(size, rng.choice(["big", "little"]))
    place = place_in(rng, data)
    return data[:place] + encoded + data[place + size :]


def cut_off(rng: random.Random, data: bytes) -> bytes:
    return data[: rng.randrange(len(data) // 3, len(data))] or b"x"


def take_out(rng: random.Random, data: bytes) -> bytes:
    place = place_in(rng, data)
    return data[:place] + data[place + rng.randint(1, 40) :] or b"x"


def repeat_part(rng: random.Random, data: bytes) -> bytes:
    start = place_in(rng, data)
    part = data[start : start + rng.choice([1, 2, 8, 12, 40, 400])]
    return data[:start] + part * rng.choice([1, 2, 10, 300]) + data[start:]


def splice(rng: random.Random, data: bytes) -> bytes:
    other = rng.choice(originals())
    return data[: rng.randrange(len(data) // 4, len(data))] + other[rng.randrange(len(other)) :]


def with_other_head(rng: random.Random, data: bytes) -> bytes:
    other = rng.choice(originals())
    size = rng.choice([4, 8, 12, 16, 32, 64, 200])
    return other[:size] + data[size:]


def change_chunk(rng: random.Random, data: bytes) -> bytes:
    """Change a PNG's chunk under a right checksum; other files: put a chunk of RIFF or a box somewhere."""
    if not data.startswith(b"\x89PNG"):
        body = rng.randbytes(rng.choice([0, 4, 30]))
        kind = rng.choice([b"VP8X", b"EXIF", b"ANMF", b"meta", b"iloc", b"pclr", b"colr", b"ispe", b"moov"])
        place = place_in(rng, data)
        head = kind + struct.pack("<L", len(body)) if data[:4] == b"RIFF" else struct.pack(">L", 8 + len(body)) + kind
        return data[:place] + head + body + data[place:]
    place, starts = 8, []
    while place + 12 <= len(data):
        starts.append(place)
        place += 12 + int.from_bytes(data[place : place + 4], "big")
    place = rng.choice(starts or [8])
    length, kind = int.from_bytes(data[place : place + 4], "big"), data[place + 4 : place + 8]
    body = data[place + 8 : place + 8 + length]
    if rng.random() < 0.3:
        kind = rng.choice(
            [b"PLTE", b"tRNS", b"IDAT", b"acTL", b"fcTL", b"fdAT", b"iCCP", b"iTXt", b"zTXt", b"pHYs", b"eXIf"]
        )
    body = set_number(rng, body or b"\0") if rng.random() < 0.7 else body
    new = chunk(kind, body) * rng.choice([1, 1, 1, 2, 50])
    return data[:place] + new + data[place + 12 + length * rng.choice([0, 1, 1]) :]


def change_tag(rng: random.Random, data: bytes) -> bytes:
    """Change an entry of a TIFF's first directory, or of the Exif block of another file."""
    at = max(data.find(b"II*\0"), data.find(b"MM\0*"), data.find(b"II+\0"))
    if at < 0 or len(data) < at + 30:
        return set_number(rng, data)
    order, big = ("<" if data[at : at + 2] == b"II" else ">"), data[at + 2] == 43
    try:
        [first] = struct.unpack_from(order + ("Q" if big else "L"), data, at + (8 if big else 4))
        [count] = struct.unpack_from(order + ("Q" if big else "H"), data, at + first)
    except struct.error:
        return set_number(rng, data)
    width = 20 if big else 12
    place = at + first + (8 if big else 2) + width * rng.randrange(max(1, min(count, 50)))
    entry = bytearray(data[place : place + width].ljust(width, b"\0"))
    for _ in range(rng.randint(1, 2)):
        field, size = rng.choice([(0, 2), (2, 2), (4, 4), (width - 4, 4), (width - 4, 2)])
        choices = {0: TAGS + MORE_TAGS, 2: tuple(range(20))}.get(field, NUMBERS)
        number = rng.choice([rng.choice(choices), rng.randrange(256**size)]) % 256**size
        entry[field : field + size] = number.to_bytes(size, "little" if order == "<" else "big")
    return data[:place] + bytes(entry) + data[place + width :]


def random_tiff(rng: random.Random, big_payload: int = 4000) -> bytes:
    """A directory of any tags of any types, after those of a picture."""
    entries = [list(entry) for entry in TAGS_OF_16_PIXELS]
    for _ in range(rng.choice([0, 1, 5, 40])):
        count = rng.choice([0, 1, 2, 4, rng.choice(NUMBERS)])
        entries.append(
            [
                rng.choice(MORE_TAGS if rng.random() < 0.9 else TAGS),
                rng.randrange(20),
                count,
                rng.choice([8, 200, rng.choice(NUMBERS)]),
            ]
        )
    rng.shuffle(entries)
    return tiff_of([tuple(entry) for entry in entries], big_payload, rng.choice([0, 8, 200]), rng.choice("<>"))  # type: ignore[misc]


def random_png(rng: random.Random) -> bytes:
    kinds = [b"tEXt", b"zTXt", b"iTXt", b"iCCP", b"eXIf", b"gAMA", b"sRGB", b"tRNS", b"PLTE", b"acTL", b"fcTL", b"zzZz"]
    bodies = [
        b"key\0\0" + zlib.compress(bytes(rng.choice([10, 10**6, 3 * 10**6]))),
        b"key\0value",
        random_tiff(rng),
        b"",
    ]
    bodies += [b"Raw profile type exif\0\0" + zlib.compress(b"\nexif\n9\n" + random_tiff(rng).hex().encode())]
    return png_with(*(chunk(rng.choice(kinds), rng.choice(bodies)) for _ in range(rng.choice([1, 3, 30]))))


def random_gif(rng: random.Random) -> bytes:
    labels = [0x01, 0xF9, 0xFE, 0xFF, 0x00, 0x21, 0x2C]
    parts = []
    for _ in range(rng.choice([1, 4, 40])):
        blocks = b"".join(
            bytes([size]) + rng.randbytes(size) for size in rng.choices(range(1, 256), k=rng.choice([0, 1, 5]))
        )
        parts.append(b"!" + bytes([rng.choice(labels)]) + blocks + rng.choice([b"\0", b"\0", b"", b"\0\0\1"]))
    return gif_with(b"".join(parts) + rng.randbytes(rng.choice([0, 0, 3])))


def random_codestream(rng: random.Random) -> bytes:
    width, height = rng.choice([1, 16, 333, 5000]), rng.choice([1, 16, 333, 5000])
    coding = bytes([rng.choice([0, 1, 7]), rng.randrange(6), 0, rng.choice([0, 1, 40]), rng.randrange(2)])
    levels = rng.choice([0, 5, 32, 33])
    coding += bytes([levels, rng.randrange(10), rng.randrange(10), rng.choice([0, 1, 64]), rng.randrange(3)])
    coding += bytes(rng.choice([0x11, 0x55, 0xFF, 0x00]) for _ in range(levels + 1))
    components = rng.choice([1, 2, 3, 4, 5])
    stream = codestream(width, height, tile=rng.choice([0, 1, 7, 64]), components=components, coding=coding)
    return jp2_of(stream, width, height, components) if rng.random() < 0.5 else stream


def random_bmp(rng: random.Random) -> bytes:
    """A bitmap of run lengths, which Pillow unpacks in Python."""
    bits, compression = rng.choice([(8, 1), (4, 2), (8, 2), (16, 3), (32, 3), (1, 0)])
    width, height = rng.choice([1, 40, 3000]), rng.choice([1, 30, 3000])
    head = struct.pack("<LLLHHLLLLLL", 40, width, height, 1, bits, compression, 0, 0, 0, rng.choice([0, 2, 256]), 0)
    runs = bytes(rng.choice([0, 0, 1, 2, 3, 255, rng.randrange(256)]) for _ in range(rng.choice([10, 3000])))
    return b"BM" + struct.pack("<LHHL", 54 + 1024 + len(runs), 0, 0, 54 + 1024) + head + bytes(1024) + runs


Construction = Callable[[random.Random], bytes]
CONSTRUCTIONS: list[Construction] = [
    random_tiff,
    random_tiff,
    random_png,
    random_gif,
    random_codestream,
    random_bmp,
    lambda rng: exif_jpeg(random_tiff(rng, rng.choice([400, 70_000]))),
    lambda rng: webp_with(b"EXIF", random_tiff(rng)),
    lambda rng: jpeg_with((0xE2, b"MPF\0" + random_tiff(rng))),
    lambda rng: jpeg_with(
        *[(rng.randrange(0xC0, 0xFF), rng.randbytes(rng.choice([0, 4, 60]))) for _ in range(rng.choice([1, 5, 200]))]
    ),
    lambda rng: tiff_one_payload(rng.choice([2, 30, 2000]), rng.choice([1000, 200_000]), rng.choice([1, 3, 4, 5])),
    lambda rng: tiff_same_tag(rng.choice([2, 3000, 60_000]), rng.choice([1000, 200_000])),
    lambda rng: tiff_behind_pointers(rng.choice([34665, 34853, 40965, 330])),
    lambda rng: gif_comment(rng.choice([100, 200_000]), rng.choice([1, 255])),
    lambda rng: avif_extents(rng.choice([1, 100, 4000])),
    lambda rng: progressive_scans(rng.choice([1, 100, 2000])),
    lambda rng: (
        b"P%d %d %d %d " % (rng.randint(1, 7), *rng.choices([1, 2, 300, 5000], k=2), rng.choice([1, 254, 255, 65535]))
        + rng.choice([bytes(5000), b"1 " * 5000, b"#" * 5000, b"12#\n" * 3000])
    ),
]
Mutation = Callable[[random.Random, bytes], bytes]
MUTATIONS: list[Mutation] = [
    flip_bytes,
    flip_bytes,
    set_number,
    set_number,
    set_number,
    change_tag,
    change_tag,
    change_chunk,
    change_chunk,
    cut_off,
    take_out,
    repeat_part,
    splice,
    with_other_head,
]
