"""Bounds of run-length-encoded BMPs: Pillow unpacks them in Python, and a single code can span 255 rows."""

import struct

from llava_ray.images.containers.budget import WorkBudget

_RUN_LENGTHS = (1, 2)  # compression types
_MAX_WIDTH = 2**16
_MAX_PIXELS = 2**24


def walk_bmp(data: bytes, budget: WorkBudget, max_frames: int) -> int:
    """Bound the size of a run-length-encoded bitmap; others are plain rows behind a short header."""
    del max_frames
    header_bytes, width, height, _, _, compression = struct.unpack_from("<LllHHL", data, 14)
    if header_bytes >= 40 and compression in _RUN_LENGTHS:
        budget.take("pixels a row in a bitmap of run lengths", _MAX_WIDTH, width)
        budget.take("pixels in a bitmap of run lengths", _MAX_PIXELS, width * abs(height))
    return 1
