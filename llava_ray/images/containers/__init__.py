"""Walks over image containers before any decoder runs: in linear time, with bounds on everything that repeats.

A small file can keep a decoder that trusts its counts and pointers busy for minutes, or make it fill the memory. The
walks follow the same structures as Pillow and its libraries. A merely broken file passes: its decoder reports that.
"""

import struct
from collections.abc import Callable
from dataclasses import dataclass

from llava_ray.images.containers.avif import walk_avif
from llava_ray.images.containers.bmp import walk_bmp
from llava_ray.images.containers.budget import WorkBudget
from llava_ray.images.containers.gif import walk_gif
from llava_ray.images.containers.jpeg import walk_jpeg
from llava_ray.images.containers.jpeg2000 import walk_jpeg2000
from llava_ray.images.containers.netpbm import walk_netpbm
from llava_ray.images.containers.png import walk_png
from llava_ray.images.containers.tiff import TIFF_MAGICS as TIFF_MAGICS
from llava_ray.images.containers.tiff import walk_tiff
from llava_ray.images.containers.webp import walk_webp

__all__ = ["Container", "WorkBudget", "identify", "walk_container"]

JP2_MAGIC = b"\x00\x00\x00\x0cjP  \x0d\x0a\x87\x0a"
MAGICS = {
    "JPEG": (b"\xff\xd8\xff",),
    "PNG": (b"\x89PNG\r\n\x1a\n",),
    "GIF": (b"GIF87a", b"GIF89a"),
    "BMP": (b"BM",),
    "TIFF": TIFF_MAGICS,
    "JPEG2000": (b"\xff\x4f\xff\x51", JP2_MAGIC),
    "PPM": tuple(b"P" + bytes([kind]) for kind in b"0123456fy"),
}

Walk = Callable[[bytes, WorkBudget, int], int]


@dataclass(frozen=True)
class Container:
    """The result of a walk."""

    format: str
    """Pillow's name of the format."""
    num_frames: int
    """Frames of GIF and TIFF, whose headers do not state them; counted up to the limit. 1 for other formats."""


def identify_format(data: bytes) -> str | None:
    """Return Pillow's name of a file's format from its first bytes; None for an unsupported one."""
    for kind, magics in MAGICS.items():
        if data.startswith(magics):
            return kind
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    return "AVIF" if data[4:8] == b"ftyp" else None


def walk_container(kind: str, data: bytes, name: str, max_frames: int) -> Container:
    """Walk a file of a format that `identify_format` returned; frames are counted up to ``max_frames + 1``.

    Raises ImageError with reason ``image_too_costly`` for more blocks, entries or referenced bytes than any ordinary
    file has.
    """
    walks: dict[str, Walk] = {
        "JPEG": walk_jpeg,
        "PNG": walk_png,
        "GIF": walk_gif,
        "BMP": walk_bmp,
        "TIFF": walk_tiff,
        "WEBP": walk_webp,
        "JPEG2000": walk_jpeg2000,
        "AVIF": walk_avif,
        "PPM": walk_netpbm,
    }
    try:
        return Container(kind, walks[kind](data, WorkBudget(name), max_frames))
    except (struct.error, IndexError):  # truncated: nothing is left to walk
        return Container(kind, 1)
