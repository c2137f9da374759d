"""Bounds of PPM's header, whose comments have no limit, and of plain bitmaps, which Pillow joins in Python."""

import re

from llava_ray.images.containers.budget import WorkBudget

_MAX_HEADER_BYTES = 2**16
_MAX_BITMAP_BYTES = 2**24  # Pillow joins a plain bitmap's pixels block by block, copying all each time
_PLAIN_BITMAP = b"P1"
# A word as Pillow reads it: after white space and comments, without comments inside it, up to one white space.
_WORD = re.compile(
    rb"(?:[ \t\n\x0b\x0c\r]|#[^\r\n]*[\r\n]?)*(?:[^ \t\n\x0b\x0c\r#]|#[^\r\n]*[\r\n]?)*[ \t\n\x0b\x0c\r]?"
)
_NUM_WORDS = {b"P1": 3, b"P4": 3}  # magic, width, height; others have a maximum value too


def walk_netpbm(data: bytes, budget: WorkBudget, max_frames: int) -> int:
    """Find the header's end, and bound the length of a plain bitmap."""
    del max_frames
    if data.startswith(_PLAIN_BITMAP):
        budget.take("bytes in a plain bitmap", _MAX_BITMAP_BYTES, len(data))
    place = 0
    head = data[: 2 * _MAX_HEADER_BYTES]
    for _ in range(_NUM_WORDS.get(data[:2], 4)):
        word = _WORD.match(head, place)
        place = word.end() if word else place
    budget.take("bytes in a PPM header", _MAX_HEADER_BYTES, place)
    return 1
