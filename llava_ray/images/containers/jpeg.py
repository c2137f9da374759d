"""Walk over JPEG's segments: those before the image data, whose metadata Pillow joins and parses, and its scans."""

import re

from llava_ray.images.containers.budget import WorkBudget
from llava_ray.images.containers.tiff import EXIF_HEADER, walk_embedded, walk_exif

_MAX_SEGMENTS = 4096
_MAX_EXIF_SEGMENTS = 128  # Pillow joins them one by one, copying all each time
_MAX_FRAME_HEADERS = 8  # each may declare many components, all of which Pillow stores
_MAX_SCANS = 128  # each is a pass over the whole image
_MAX_STRAY_BYTES = 2**16  # between segments, read one by one

# Marker bytes after 0xff: without length, end of image, scan, application data.
_WITHOUT_LENGTH = {*range(0xD0, 0xDA), 0xC8, *range(0xF0, 0xFE)}
END, _SCAN, _APP1, _APP2 = 0xD9, 0xDA, 0xE1, 0xE2
_FIRST_MARKER = 0xC0
_FRAME_HEADERS = {*range(0xC0, 0xD0), 0xDE} - {0xC4, 0xC8, 0xCC}
_NEXT_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")  # after a scan's data, which may contain restart markers


def walk_jpeg(data: bytes, budget: WorkBudget, max_frames: int) -> int:
    """Walk the segments up to the end of the first picture; further pictures of the file are never read."""
    del max_frames
    exif: list[bytes] = []
    place, num_scans = 2, 0
    while place + 1 < len(data):
        if data[place] != 0xFF or data[place + 1] in (0x00, 0xFF):
            place = _skip_stray(data, place, budget)
            continue
        marker = data[place + 1]
        budget.take("JPEG segments", _MAX_SEGMENTS)
        if marker < _FIRST_MARKER or (marker == END and num_scans):
            break
        place += 2
        if marker in _WITHOUT_LENGTH:
            continue
        body, place = _segment(data, place)
        if marker == _SCAN:
            num_scans += 1
            budget.take("JPEG scans", _MAX_SCANS)
            found = _NEXT_MARKER.search(data, place)
            place = found.start() if found else len(data)
        else:
            _take_segment(marker, body, exif, budget)
    walk_exif(b"".join(exif), budget)
    return 1


def _take_segment(marker: int, body: bytes, exif: list[bytes], budget: WorkBudget) -> None:
    """Count a segment that Pillow stores; parts of the Exif block are added to ``exif``."""
    if marker in _FRAME_HEADERS:
        budget.take("JPEG frame headers", _MAX_FRAME_HEADERS)
    elif marker == _APP1 and body.startswith(EXIF_HEADER):
        budget.take("Exif segments", _MAX_EXIF_SEGMENTS)
        exif.append(body[len(EXIF_HEADER) :])
    elif marker == _APP2 and body.startswith(b"MPF\0"):
        walk_embedded(body[4:], budget)


def _segment(data: bytes, place: int) -> tuple[bytes, int]:
    """Return a segment's body and the position of the next one."""
    length = max(2, int.from_bytes(data[place : place + 2], "big"))
    return data[place + 2 : place + length], place + length


def _skip_stray(data: bytes, place: int, budget: WorkBudget) -> int:
    """Return the position of the next possible marker, after bytes that belong to no segment."""
    if data[place] != 0xFF:
        found = data.find(b"\xff", place)
        found = len(data) if found < 0 else found
    else:  # padding, or an escaped 0xff
        found = place + (2 if data[place + 1] == 0x00 else 1)
    budget.take("stray bytes between JPEG segments", _MAX_STRAY_BYTES, found - place)
    return found
