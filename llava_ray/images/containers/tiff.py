"""Walk over TIFF's directories, of which Exif blocks and the index of multi-picture JPEGs consist as well."""

import struct
from dataclasses import dataclass, field

from llava_ray.images.containers.budget import WorkBudget

TIFF_MAGICS = (b"II*\0", b"MM\0*", b"MM*\0", b"II\0*", b"MM\0+", b"II+\0")
EXIF_HEADER = b"Exif\0\0"

_MAX_TAGS = 4096
_MAX_DIRECTORIES = 64  # reached through pointers; pages are counted separately
_MAX_PAGES = 100_000
_MAX_VALUES = 2**20
_MAX_FRACTIONS = 4096  # each becomes a Python object
_MAX_STRIPS = 2**18
_MAX_EXIF_HEADERS = 8
_SPARE_BYTES = 2**20  # beyond the file's own length, as directories may share small payloads

_UNIT_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
_PLAIN_TYPES = {1, 2, 6, 7}
_FRACTION_TYPES = {5, 10}
_STRIP_TAGS = {273, 279, 324, 325}  # offsets and byte counts of strips and tiles
_POINTER_TAGS = {34665, 34853, 40965}  # to the directories of Exif, GPS and interoperability
_WIDTH, _HEIGHT, _TILE_WIDTH, _TILE_HEIGHT = 256, 257, 322, 323
_SMALL_TILE = 2**22  # pixels of a tile that may exceed its image


@dataclass
class _TiffLayout:
    """The number format of a file, and the directories visited."""

    data: bytes
    order: str
    big: bool
    seen: set[int] = field(default_factory=set)

    def unpack(self, small: str, big: str, place: int) -> tuple[int, ...]:
        """Unpack the numbers at a position; ``big`` is their format in BigTIFF."""
        return struct.unpack_from(self.order + (big if self.big else small), self.data, place)


def walk_tiff(data: bytes, budget: WorkBudget, max_frames: int) -> int:
    """Walk the first page with everything it points to, then the chain of pages. Returns the number of pages."""
    order = "<" if data[:2] == b"II" else ">"
    layout = _TiffLayout(data, order, big=data[2:3] == b"+")
    first = struct.unpack_from(order + "Q", data, 8)[0] if layout.big else struct.unpack_from(order + "L", data, 4)[0]
    _walk_directories(layout, first, budget)
    if data[:4] == b"MM\0+":  # Pillow takes it for a TIFF, libtiff for a BigTIFF
        _walk_directories(_TiffLayout(data, order, big=True), struct.unpack_from(">Q", data, 8)[0], budget)
    return _count_pages(layout, first, budget, max_frames)


def walk_exif(exif: bytes, budget: WorkBudget) -> None:
    """Walk an Exif block, with or without the header that some containers put before it."""
    start = 0
    while exif.startswith(EXIF_HEADER, start):
        budget.take("Exif headers before one block", _MAX_EXIF_HEADERS)
        start += len(EXIF_HEADER)
    walk_embedded(exif[start:], budget)


def walk_embedded(data: bytes, budget: WorkBudget) -> None:
    """Walk the directories of a TIFF inside another container; a broken one passes."""
    if not data.startswith(TIFF_MAGICS):
        return
    order = "<" if data[:2] == b"II" else ">"
    try:
        _walk_directories(_TiffLayout(data, order, big=False), struct.unpack_from(order + "L", data, 4)[0], budget)
    except (struct.error, IndexError):
        return


def _walk_directories(layout: _TiffLayout, place: int, budget: WorkBudget) -> None:
    """Walk a directory and those that its Exif and GPS tags point to."""
    waiting = [place]
    while waiting:
        place = waiting.pop()
        if place in layout.seen:
            continue
        layout.seen.add(place)
        budget.take("directories of tags", _MAX_DIRECTORIES)
        try:
            waiting += _walk_directory(layout, place, budget)
        except (struct.error, OverflowError):  # truncated
            continue


def _walk_directory(layout: _TiffLayout, place: int, budget: WorkBudget) -> list[int]:
    """Count one directory's tags and referenced bytes; return the targets of its pointers."""
    [count] = layout.unpack("H", "Q", place)
    entry, width = place + (8 if layout.big else 2), 20 if layout.big else 12
    count = min(count, (len(layout.data) - entry) // width)  # entries beyond the file's end cost nothing
    budget.take("tags", _MAX_TAGS, count)
    pointers, sides = [], dict[int, int]()
    for number in range(count):
        here = entry + number * width
        tag, kind, length = layout.unpack("HHL", "HHQ", here)
        [value] = layout.unpack("L", "Q", here + (12 if layout.big else 8))
        unit = _UNIT_BYTES.get(kind, 0)
        if unit * length > (8 if layout.big else 4):
            size = min(unit * length, max(0, len(layout.data) - value))
            budget.take("bytes that tags reference", 2 * len(layout.data) + _SPARE_BYTES, size)
            _take_values(tag, kind, size // unit, budget)
        if tag in _POINTER_TAGS:
            pointers.append(value)
        if tag in (_WIDTH, _HEIGHT, _TILE_WIDTH, _TILE_HEIGHT):
            sides[tag] = _first_value(layout, kind, here)
    _check_tile(sides, budget)
    return pointers


def _take_values(tag: int, kind: int, length: int, budget: WorkBudget) -> None:
    """Count the numbers of one tag, by its kind: strips, fractions or other."""
    if tag in _STRIP_TAGS:
        budget.take(f"numbers in tag {tag} (strips or tiles)", _MAX_STRIPS, length)
    elif kind in _FRACTION_TYPES:
        budget.take("fractions in tags", _MAX_FRACTIONS, length)
    elif kind not in _PLAIN_TYPES:
        budget.take("numbers in tags", _MAX_VALUES, length)


def _first_value(layout: _TiffLayout, kind: int, here: int) -> int:
    """Return the number stored inline in an entry."""
    place = here + (12 if layout.big else 8)
    code = {1: "B", 3: "H", 4: "L", 16: "Q"}.get(kind, "L")
    number: int = struct.unpack_from(layout.order + code, layout.data, place)[0]
    return number


def _check_tile(sides: dict[int, int], budget: WorkBudget) -> None:
    """Refuse a tile that is far larger than its image: libtiff allocates all of it."""
    tile = sides.get(_TILE_WIDTH, 0) * sides.get(_TILE_HEIGHT, 0)
    image = sides.get(_WIDTH, 0) * sides.get(_HEIGHT, 0)
    budget.take("pixels in a tile", max(_SMALL_TILE, 2 * image), tile)


def _count_pages(layout: _TiffLayout, place: int, budget: WorkBudget, max_frames: int) -> int:
    """Count the chain of pages, which may be a loop, up to ``max_frames``."""
    seen = set[int]()
    while place and place not in seen and len(seen) <= max_frames:
        budget.take("pages", _MAX_PAGES)
        seen.add(place)
        try:
            [count] = layout.unpack("H", "Q", place)
            width = 20 if layout.big else 12
            [place] = layout.unpack("L", "Q", place + (8 if layout.big else 2) + count * width)
        except (struct.error, OverflowError):
            break
    return max(1, len(seen))
