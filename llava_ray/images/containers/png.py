"""Walk over PNG's chunks, those of animations included."""

import struct

from llava_ray.images.containers.budget import WorkBudget
from llava_ray.images.containers.tiff import walk_exif

_MAX_CHUNKS = 4096
_MAX_DATA_CHUNKS = 2**17
_MAX_TEXTS = 1024
_MAX_COMPRESSED = 16  # each may expand to a megabyte
_MAX_TEXT_BYTES = 2**25
_TEXTS = {b"tEXt", b"zTXt", b"iTXt"}
_COMPRESSED = {b"zTXt", b"iTXt", b"iCCP"}
_DATA = {b"IDAT", b"fdAT", b"fcTL"}


def walk_png(data: bytes, budget: WorkBudget, max_frames: int) -> int:
    """Walk all chunks: count those of text and profiles, and walk the Exif block."""
    del max_frames
    place = 8
    while place + 8 <= len(data):
        length, kind = struct.unpack_from(">L4s", data, place)
        if kind in _DATA:
            budget.take("PNG data chunks", _MAX_DATA_CHUNKS)
        else:
            budget.take("PNG chunks beside those of data", _MAX_CHUNKS)
        if kind in _TEXTS:
            budget.take("PNG texts", _MAX_TEXTS)
            budget.take("bytes of PNG texts", _MAX_TEXT_BYTES, min(length, len(data) - place))
        if kind in _COMPRESSED:
            budget.take("compressed PNG texts", _MAX_COMPRESSED)
        if kind == b"eXIf":
            walk_exif(data[place + 8 : place + 8 + length], budget)
        place += 12 + length
    return 1
