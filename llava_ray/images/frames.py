"""How many frames a file holds, counted without decoding one, and no further than asked."""

import io

from PIL import Image

GIF_EXTENSION, GIF_IMAGE, GIF_END = 0x21, 0x2C, 0x3B  # GIF89a, appendix A


def count_frames(data: bytes, at_most: int) -> int:
    """Count the frames of an image that Pillow has been able to open; ``at_most + 1`` if there are more."""
    if data[:3] == b"GIF":
        return count_gif_frames(data, at_most)
    with Image.open(io.BytesIO(data)) as image:
        if image.format != "TIFF":
            return min(at_most + 1, int(getattr(image, "n_frames", 1)))  # only some formats have the attribute
        for number in range(1, at_most + 1):
            try:
                image.seek(number)  # reads a directory, no pixels
            except EOFError:
                return number
        return at_most + 1


def count_gif_frames(data: bytes, at_most: int) -> int:
    """Walk the blocks of a GIF, whose header does not say how many frames follow."""
    count = 0
    place = 13 + colour_table(data[10:11])
    while place < len(data) and count <= at_most:
        kind = data[place]
        if kind == GIF_IMAGE:
            count += 1
            place = after_blocks(data, place + 11 + colour_table(data[place + 9 : place + 10]))
        elif kind == GIF_EXTENSION:
            place = after_blocks(data, place + 2)
        else:  # the end, or something that no decoder goes on after
            break
    return count


def colour_table(flags: bytes) -> int:
    """Return the bytes of the colour table that a byte of flags announces."""
    return 3 * 2 ** ((flags[0] & 7) + 1) if flags and flags[0] & 0x80 else 0


def after_blocks(data: bytes, place: int) -> int:
    """Return where a chain of sub-blocks, each led by its length, has ended."""
    while place < len(data) and data[place]:
        place += 1 + data[place]
    return place + 1
