"""WebP's chunks, and the size of its canvas, for which libwebp makes room as soon as a file is opened."""

import struct

from llava_ray.images.containers.budget import Budget
from llava_ray.images.containers.tiff import walk_exif

MAX_CHUNKS = 4096


def walk_webp(data: bytes, budget: Budget, max_frames: int) -> int:
    """Walk all chunks; the Exif block is walked too."""
    del max_frames
    place = 12
    while place + 8 <= len(data):
        kind, length = struct.unpack_from("<4sL", data, place)
        budget.take("WebP chunks", MAX_CHUNKS)
        if kind == b"EXIF":
            walk_exif(data[place + 8 : place + 8 + length], budget)
        place += 8 + length + length % 2
    return 1


def canvas_size(data: bytes) -> tuple[int, int]:
    """Return the (width, height) that the extended header announces; (1, 1) where there is none."""
    if data[12:16] != b"VP8X" or len(data) < 30:
        return 1, 1  # a plain picture has at most 16,383 pixels a side, and its frame is all there is
    return 1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little")
