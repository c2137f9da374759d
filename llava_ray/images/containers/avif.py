"""Walk over AVIF's boxes: its items, and the ranges of the file that they consist of."""

import struct

from llava_ray.images.containers.boxes import walk_boxes
from llava_ray.images.containers.budget import WorkBudget
from llava_ray.images.containers.tiff import walk_exif

_PARENTS = {b"meta", b"iprp", b"ipco", b"iref", b"moov", b"trak", b"mdia", b"minf", b"stbl", b"dinf", b"iinf"}
_MAX_ITEMS = 2048  # looked up by a linear search over all; tiles of a grid are items
_MAX_EXTENTS = 2**14
_SPARE_BYTES = 2**20
_COUNTED = {b"iinf", b"ipma", b"iloc"}
_ITEM_DATA = 1  # construction method: data in the box "idat" instead of the file


def walk_avif(data: bytes, budget: WorkBudget, max_frames: int) -> int:
    """Walk all boxes; bound the items and the bytes that they reference, and walk the Exif block."""
    del max_frames
    skipped = {b"meta": 4, b"iref": 4, b"iinf": 6 if not _has_wide_item_count(data) else 8}
    locations: dict[int, list[tuple[int, int, int]]] = {}
    exif_items, inner = set[int](), 0
    for kind, start, end in walk_boxes(data, budget, _PARENTS, skipped):
        box = data[start:end] if kind in (*_COUNTED, b"infe") else b""
        try:
            if kind in (b"iinf", b"ipma"):
                budget.take(f"entries of {kind.decode()}", _MAX_ITEMS, _entry_count(kind, box))
            elif kind == b"iloc":
                locations |= _read_locations(box, budget, len(data))
            elif kind == b"infe" and _is_exif(box):
                exif_items.add(_item_id(box))
            elif kind == b"idat":
                inner = start
        except (struct.error, IndexError):  # truncated
            continue
    for item in exif_items & set(locations):
        parts = [data[(inner if method == _ITEM_DATA else 0) + at :][:size] for method, at, size in locations[item]]
        walk_exif(b"".join(parts)[4:], budget)
    return 1


def _has_wide_item_count(data: bytes) -> bool:
    """Return whether the list of items has a wide counter."""
    place = data.find(b"iinf")
    return place >= 0 and data[place + 4 : place + 5] > b"\0"


def _entry_count(kind: bytes, box: bytes) -> int:
    """Return the number of entries that a list of items or properties declares, at most those that fit into the box."""
    wide = kind == b"ipma" or box[0] > 0
    count: int = struct.unpack_from(">L" if wide else ">H", box, 4)[0]
    return min(count, len(box) // 3)


def _is_exif(box: bytes) -> bool:
    """Return whether an item's entry (version 2 or 3) is that of an Exif block."""
    return box[12:16] == b"Exif" if box[0] > 2 else box[8:12] == b"Exif"


def _item_id(box: bytes) -> int:
    """Return the id of an item's entry."""
    number: int = struct.unpack_from(">L" if box[0] > 2 else ">H", box, 4)[0]
    return number


def _read_locations(box: bytes, budget: WorkBudget, file_bytes: int) -> dict[int, list[tuple[int, int, int]]]:
    """Return each item's (construction method, offset, size), and bound their number and sum."""
    version = box[0]
    widths = [box[4] >> 4, box[4] & 15, box[5] >> 4, box[5] & 15 if version else 0]
    offset_bytes, length_bytes, base_bytes, index_bytes = widths
    place = 6

    def number(width: int) -> int:
        nonlocal place
        place += width
        if place > len(box):
            raise IndexError("truncated")
        return int.from_bytes(box[place - width : place], "big")

    locations: dict[int, list[tuple[int, int, int]]] = {}
    for _ in range(number(4 if version > 1 else 2)):
        budget.take("entries of iloc", _MAX_ITEMS)
        item = number(4 if version > 1 else 2)
        method = number(2) & 15 if version else 0
        number(2)  # reference to another file, never read
        base = number(base_bytes)
        extents = []
        for _ in range(number(2)):
            budget.take("parts of items", _MAX_EXTENTS)
            number(index_bytes)
            at, size = base + number(offset_bytes), number(length_bytes)
            size = min(size or file_bytes, max(0, file_bytes - at))
            budget.take("bytes that items reference", 2 * file_bytes + _SPARE_BYTES, size)
            extents.append((method, at, size))
        locations[item] = extents
    return locations
