"""Keys of the blocks of a sequence: each stands for its own tokens and for all before it.

A block holds ``BLOCK`` tokens. Its key hashes their ids, the images that they belong to, and the key of the block
before, down to a root of the adapter: blocks with the same key have the same keys and values, whoever wrote the text.
Roots are random, so that nobody can construct a text whose key is another's, and an adapter that was replaced never
meets its predecessor's.
"""

import hashlib
import os
from array import array
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

BLOCK = 16  # tokens of a block: what a request reads again at most of what is known
_SIZE = 16  # bytes of a key


@runtime_checkable
class PlacedImage(Protocol):
    """An image at its position in a prompt."""

    key: str
    """Identifies its content and its projector."""
    num_tokens: int
    first: int


class KeyRoots:
    """The first link of each adapter's keys."""

    def __init__(self) -> None:
        """Initialise without any; they are drawn when they are first needed."""
        self._roots: dict[str | None, bytes] = {}

    def find(self, adapter: str | None) -> bytes:
        """Return an adapter's root, the base's for None."""
        if adapter not in self._roots:
            self._roots[adapter] = os.urandom(_SIZE)
        return self._roots[adapter]

    def renew(self, adapter: str | None) -> None:
        """Let nothing that was computed with an adapter so far be found again: its weights are others now."""
        self._roots.pop(adapter, None)


class BlockKeys:
    """The keys of one sequence's blocks, computed as far as they are asked for.

    Its tokens may become more; those before must stay.
    """

    def __init__(self, root: bytes, prompt: Sequence[int], images: Sequence[PlacedImage] = ()) -> None:
        """Initialise with the prompt, and its images in the order of their positions."""
        self.root = root
        self.prompt = prompt
        self.images = images
        self._keys: list[bytes] = []

    def first(self, count: int, answer: Sequence[int] = ()) -> list[bytes]:
        """Return the keys of the first ``count`` blocks of prompt and ``answer``, which must have so many tokens."""
        while len(self._keys) < count:
            self._keys.append(self._next(len(self._keys) * BLOCK, answer))
        return self._keys[:count]

    def _next(self, start: int, answer: Sequence[int]) -> bytes:
        """Return the key of the block that begins at ``start``."""
        end, known = start + BLOCK, len(self.prompt)
        ids = [*self.prompt[start:end], *answer[max(0, start - known) : max(0, end - known)]]
        assert len(ids) == BLOCK
        found = hashlib.blake2b(self._keys[-1] if self._keys else self.root, digest_size=_SIZE)
        found.update(array("q", ids).tobytes())
        for image in self.images:
            if image.first < end and image.first + image.num_tokens > start:
                found.update(f"\0{image.key}\0{image.first - start}\0{image.num_tokens}".encode())
        return found.digest()
