"""Walk over WebP's chunks, and the size of its canvas, which libwebp allocates as soon as a file is opened."""

import struct

from llava_ray.images.containers.budget import WorkBudget
from llava_ray.images.containers.tiff import walk_exif

_MAX_CHUNKS = 4096
_MASK = 2**14 - 1  # a side's bits in a frame's own header


def walk_webp(data: bytes, budget: WorkBudget, max_frames: int) -> int:
    """Walk all chunks and the Exif block."""
    del max_frames
    place = 12
    while place + 8 <= len(data):
        kind, length = struct.unpack_from("<4sL", data, place)
        budget.take("WebP chunks", _MAX_CHUNKS)
        if kind == b"EXIF":
            walk_exif(data[place + 8 : place + 8 + length], budget)
        place += 8 + length + length % 2
    return 1


def canvas_size(data: bytes) -> tuple[int, int]:
    """Return the (width, height) that the first chunk declares; (1, 1) where libwebp does not accept that chunk."""
    kind, start = data[12:16], data[20:30].ljust(10, b"\0")
    if kind == b"VP8X":
        return 1 + int.from_bytes(start[4:7], "little"), 1 + int.from_bytes(start[7:10], "little")
    if kind == b"VP8 ":
        return max(1, int.from_bytes(start[6:8], "little") & _MASK), max(1, int.from_bytes(start[8:], "little") & _MASK)
    if kind == b"VP8L":
        bits = int.from_bytes(start[1:5], "little")
        return 1 + (bits & _MASK), 1 + (bits >> 14 & _MASK)
    return 1, 1
