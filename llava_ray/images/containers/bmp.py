"""BMP's header: bitmaps of run lengths are unpacked in Python, and one of their codes stands for 255 rows."""

import struct

from llava_ray.images.containers.budget import Budget

_RUN_LENGTHS = (1, 2)  # kinds of compression
_MAX_WIDTH = 2**16
_MAX_PIXELS = 2**24


def walk_bmp(data: bytes, budget: Budget, max_frames: int) -> int:
    """Bound the size of a bitmap of run lengths; others are rows behind a short header."""
    del max_frames
    header_bytes, width, height, _, _, compression = struct.unpack_from("<LllHHL", data, 14)
    if header_bytes >= 40 and compression in _RUN_LENGTHS:
        budget.take("pixels a row in a bitmap of run lengths", _MAX_WIDTH, width)
        budget.take("pixels in a bitmap of run lengths", _MAX_PIXELS, width * abs(height))
    return 1
