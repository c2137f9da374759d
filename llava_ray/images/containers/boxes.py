"""Boxes of the ISO base media format (ISO 14496-12), which AVIF and JPEG 2000 files are made of."""

import struct
from collections.abc import Collection, Iterator

from llava_ray.images.containers.budget import WorkBudget

_MAX_BOXES = 8192
_MAX_DEPTH = 12


def walk_boxes(
    data: bytes, budget: WorkBudget, parents: Collection[bytes], skipped: dict[bytes, int]
) -> Iterator[tuple[bytes, int, int]]:
    """Yield (kind, start, end) of each box's content, boxes inside ``parents`` included.

    ``skipped`` is the number of bytes of a parent before its first box.
    """
    waiting = [(0, len(data), 0)]
    while waiting:
        place, end, depth = waiting.pop()
        while place + 8 <= end:
            length, kind = struct.unpack_from(">L4s", data, place)
            budget.take("boxes", _MAX_BOXES)
            start = place + 8
            if length == 1 and place + 16 <= end:
                [length] = struct.unpack_from(">Q", data, place + 8)
                start = place + 16
            stop = end if length == 0 else min(end, place + length)
            if stop < start:
                break
            yield kind, start, stop
            if kind in parents and depth < _MAX_DEPTH:
                waiting.append((start + skipped.get(kind, 0), stop, depth + 1))
            place = stop
