"""Walk over JPEG 2000: boxes around a codestream (ISO 15444-1, annex A), whose header decides what is allocated."""

import struct

from llava_ray.images.containers.boxes import walk_boxes
from llava_ray.images.containers.budget import WorkBudget

_PARENTS = {b"jp2h", b"res "}
_CODESTREAM = b"\xff\x4f"
_SIZE, _CODING, _CODING_OF_COMPONENT, _TILE_PART, _DATA, _END = 0xFF51, 0xFF52, 0xFF53, 0xFF90, 0xFF93, 0xFFD9

_MAX_MARKERS = 2**16
_MAX_TILES = 2**13  # a few kilobytes each
_MAX_BLOCKS = 2**21  # code blocks and precincts, about a hundred bytes each
_MAX_COMPONENTS = 16
_MAX_LAYERS = 1024
_MAX_PACKETS = 2**23


def walk_jpeg2000(data: bytes, budget: WorkBudget, max_frames: int) -> int:
    """Walk the boxes and the codestream's markers."""
    del max_frames
    if data.startswith(_CODESTREAM):
        _walk_codestream(data, 0, budget)
        return 1
    for kind, start, _ in walk_boxes(data, budget, _PARENTS, {}):
        if kind == b"jp2c":
            _walk_codestream(data, start, budget)
    return 1


def _walk_codestream(data: bytes, place: int, budget: WorkBudget) -> None:
    """Walk the markers of the main header and of each tile part, whose data is skipped."""
    place += 2
    num_samples, part_end = 0, len(data)
    while place + 4 <= len(data):
        marker, length = struct.unpack_from(">HH", data, place)
        budget.take("JPEG 2000 markers", _MAX_MARKERS)
        if marker == _DATA:
            place = part_end
            continue
        if marker == _END:
            return
        if marker == _SIZE:
            num_samples = _count_samples(data, place, budget)
        elif marker in (_CODING, _CODING_OF_COMPONENT):
            _check_coding(data, place, marker, num_samples, budget)
        elif marker == _TILE_PART:
            part_length: int = struct.unpack_from(">L", data, place + 6)[0]
            part_end = place + part_length if part_length >= 14 else len(data)
        place += 2 + max(2, length)


def _count_samples(data: bytes, place: int, budget: WorkBudget) -> int:
    """Return width x height x components, and bound components and tiles."""
    sides: tuple[int, ...] = struct.unpack_from(">8LH", data, place + 6)
    right, bottom, left, top, tile_w, tile_h, tile_left, tile_top, components = sides
    budget.take("JPEG 2000 components", _MAX_COMPONENTS, components)
    if tile_w and tile_h:
        columns, rows = -(-max(0, right - tile_left) // tile_w), -(-max(0, bottom - tile_top) // tile_h)
        budget.take("JPEG 2000 tiles", _MAX_TILES, columns * rows)
    return max(0, right - left) * max(0, bottom - top) * components


def _check_coding(data: bytes, place: int, marker: int, num_samples: int, budget: WorkBudget) -> None:
    """Bound the code blocks, precincts, layers and packets that a coding style allocates for so many samples."""
    style, layers, start = data[place + 4], struct.unpack_from(">H", data, place + 6)[0], place + 9
    if marker == _CODING_OF_COMPONENT:
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
        ("JPEG 2000 layers", _MAX_LAYERS, layers),
        ("JPEG 2000 code blocks", _MAX_BLOCKS, num_blocks),
        ("JPEG 2000 packets", _MAX_PACKETS, num_precincts * layers),
    ):
        if amount > limit:
            budget.take(what, limit, amount)
