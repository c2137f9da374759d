"""Encoded images, made without any service."""

import io
import random

from PIL import Image


def picture(width: int = 40, height: int = 30, colour: str = "red", kind: str = "PNG") -> bytes:
    """An encoded image of one colour."""
    file = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(file, kind)
    return file.getvalue()


def noise(num_bytes: int) -> bytes:
    """An image of about so many bytes, and no more, that nothing makes smaller."""
    side = int((num_bytes / 3 - 1000) ** 0.5)
    buffer = io.BytesIO()
    Image.frombytes("RGB", (side, side), random.Random(side).randbytes(side * side * 3)).save(
        buffer, "PNG", compress_level=0
    )
    return buffer.getvalue()
