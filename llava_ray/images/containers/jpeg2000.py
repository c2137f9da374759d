"""JPEG 2000: boxes around a codestream (ISO 15444-1, annex A), whose few numbers decide how much is laid out for it."""

import struct

from llava_ray.images.containers.boxes import walk_boxes
from llava_ray.images.containers.budget import Budget

PARENTS = {b"jp2h", b"res "}
CODESTREAM = b"\xff\x4f"
SIZE, CODING, CODING_OF_COMPONENT, TILE_PART, DATA, END = 0xFF51, 0xFF52, 0xFF53, 0xFF90, 0xFF93, 0xFFD9

MAX_MARKERS = 2**16
MAX_TILES = 2**13  # a few kilobytes each
MAX_BLOCKS = 2**21  # code blocks and precincts, about a hundred bytes each
MAX_COMPONENTS = 16
MAX_LAYERS = 1024
MAX_PACKETS = 2**23


def walk_jpeg2000(data: bytes, budget: Budget, max_frames: int) -> int:
    """Walk the boxes and the codestream's markers."""
    del max_frames
    if data.startswith(CODESTREAM):
        walk_codestream(data, 0, budget)
        return 1
    for kind, start, _ in walk_boxes(data, budget, PARENTS, {}):
        if kind == b"jp2c":
            walk_codestream(data, start, budget)
    return 1


def walk_codestream(data: bytes, place: int, budget: Budget) -> None:
    """Walk the markers of the main header and of each part of a tile, whose data are skipped."""
    place += 2
    num_samples, part_end = 0, len(data)
    while place + 4 <= len(data):
        marker, length = struct.unpack_from(">HH", data, place)
        budget.take("JPEG 2000 markers", MAX_MARKERS)
        if marker == DATA:
            place = part_end
            continue
        if marker == END:
            return
        if marker == SIZE:
            num_samples = count_samples(data, place, budget)
        elif marker in (CODING, CODING_OF_COMPONENT):
            check_coding(data, place, marker, num_samples, budget)
        elif marker == TILE_PART:
            part_length: int = struct.unpack_from(">L", data, place + 6)[0]
            part_end = place + part_length if part_length >= 14 else len(data)
        place += 2 + max(2, length)


def count_samples(data: bytes, place: int, budget: Budget) -> int:
    """Return width x height x components, and bound components and tiles."""
    sides: tuple[int, ...] = struct.unpack_from(">8LH", data, place + 6)
    right, bottom, left, top, tile_w, tile_h, tile_left, tile_top, components = sides
    budget.take("JPEG 2000 components", MAX_COMPONENTS, components)
    if tile_w and tile_h:
        columns, rows = -(-max(0, right - tile_left) // tile_w), -(-max(0, bottom - tile_top) // tile_h)
        budget.take("JPEG 2000 tiles", MAX_TILES, columns * rows)
    return max(0, right - left) * max(0, bottom - top) * components


def check_coding(data: bytes, place: int, marker: int, num_samples: int, budget: Budget) -> None:
    """Bound the code blocks, precincts, layers and packets that a coding style lays out for so many samples."""
    style, layers, start = data[place + 4], struct.unpack_from(">H", data, place + 6)[0], place + 9
    if marker == CODING_OF_COMPONENT:
        style, layers, start = data[place + 5], 1, place + 6
    levels = data[start] & 63
    block = 2 ** ((data[start + 1] & 15) + (data[start + 2] & 15) + 4)
    num_blocks = num_precincts = 0
    for level in range(levels + 1):  # each has a quarter of the next one's samples
        size = data[start + 5 + level] if style & 1 else 0xFF
        precinct = 2 ** ((size & 15) + (size >> 4))
        samples = num_samples // 4 ** (levels - level)
        num_precincts += samples // precinct + 1
        num_blocks += samples // min(block, max(1, precinct // 4)) + 1
    for what, limit, amount in (
        ("JPEG 2000 layers", MAX_LAYERS, layers),
        ("JPEG 2000 code blocks", MAX_BLOCKS, num_blocks),
        ("JPEG 2000 packets", MAX_PACKETS, num_precincts * layers),
    ):
        if amount > limit:
            budget.take(what, limit, amount)
