"""Walk over GIF's blocks (GIF89a, appendix A), which also counts the frames."""

from llava_ray.images.containers.budget import WorkBudget

_EXTENSION, _IMAGE, _END = 0x21, 0x2C, 0x3B
_COMMENT, _APPLICATION = 0xFE, 0xFF

_MAX_EXTENSIONS = 4096
_MAX_COMMENT_BYTES = 2**18
_MAX_COMMENT_BLOCKS = 8192  # Pillow appends each to the previous ones, copying all of them
_MAX_STRAY_BYTES = 2**16  # between blocks, read one by one
_MAX_BLOCKS = 2**18
_USUAL_BLOCK_BYTES = 32  # of image data; encoders write 255


def walk_gif(data: bytes, budget: WorkBudget, max_frames: int) -> int:
    """Walk the blocks as Pillow reads them, up to ``max_frames`` frames. Returns the number of frames."""
    walker = GifWalker(data, budget)
    place = 13 + _colour_table(data[10:11])
    count = 0
    while place < len(data) and count <= max_frames:
        kind = data[place]
        if kind == _END:
            break
        if kind == _IMAGE:
            count += 1
            if count > max_frames:
                break
            place = walker.after_blocks(place + 11 + _colour_table(data[place + 9 : place + 10]))
        elif kind == _EXTENSION:
            budget.take("GIF extensions", _MAX_EXTENSIONS)
            place = walker.after_extension(place)
        else:  # decoders search on for the next block
            budget.take("stray bytes between GIF blocks", _MAX_STRAY_BYTES)
            place += 1
    return max(1, count)


def _colour_table(flags: bytes) -> int:
    """Return the size of the colour table that a flags byte declares."""
    return 3 * 2 ** ((flags[0] & 7) + 1) if flags and flags[0] & 0x80 else 0


class GifWalker:
    """A walker over chains of sub-blocks, each preceded by its length."""

    def __init__(self, data: bytes, budget: WorkBudget) -> None:
        """Count the sub-blocks of ``data`` in ``budget``."""
        self.data = data
        self.budget = budget
        self.most_blocks = _MAX_BLOCKS + len(data) // _USUAL_BLOCK_BYTES

    def after_blocks(self, place: int) -> int:
        """Return the position after a chain."""
        data, count = self.data, 0
        while place < len(data) and data[place]:
            place += 1 + data[place]
            count += 1
            if not count % 1024:
                self.budget.take("GIF sub-blocks", self.most_blocks, 1024)
        return place + 1

    def after_extension(self, place: int) -> int:
        """Return the position after an extension as Pillow reads it, which continues after an empty first sub-block."""
        label = self.data[place + 1]
        if label == _COMMENT:
            return self.after_comment(place + 2)
        first = self.data[place + 2]
        following = place + 3 + first
        if label == _APPLICATION and self.data.startswith(b"NETSCAPE2.0", place + 3):
            following += 1 + self.data[following]
        return self.after_blocks(following)

    def after_comment(self, place: int) -> int:
        """Return the position after a comment."""
        data = self.data
        while place < len(data) and data[place]:
            self.budget.take("sub-blocks of GIF comments", _MAX_COMMENT_BLOCKS)
            self.budget.take("bytes of GIF comments", _MAX_COMMENT_BYTES, data[place])
            place += 1 + data[place]
        return place + 1
