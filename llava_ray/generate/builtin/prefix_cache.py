"""Keys and values of text that was read before, in blocks that any request may copy into its slot.

Requests copy instead of sharing one place in memory: attention on a CPU reads one slice for a whole batch, and copying
a block takes a thousandth of the time of computing it. So no block is ever in use between two steps, and each can be
evicted at any time.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence

from jaxtyping import Shaped
from torch import Tensor

from llava_ray.generate.builtin.prefix_keys import BLOCK


class PrefixCache:
    """An LRU cache of blocks by their keys, bounded in tokens. Only the model's thread uses it."""

    def __init__(self, max_tokens: int) -> None:
        """Initialise an empty cache; with less than one block it keeps nothing."""
        self.max_tokens = max_tokens
        self._blocks: OrderedDict[bytes, Tensor] = OrderedDict()
        self.num_queries = self.num_hits = self.num_evicted = 0
        """Prompt tokens that were looked up, those that were found; blocks that had to leave."""

    @property
    def num_tokens(self) -> int:
        """Return the number of tokens in the cache."""
        return len(self._blocks) * BLOCK

    @property
    def is_on(self) -> bool:
        """Return whether anything can be kept."""
        return self.max_tokens >= BLOCK

    def __contains__(self, key: bytes) -> bool:
        """Return whether a block is known, without using it."""
        return key in self._blocks

    def find(self, keys: Sequence[bytes]) -> list[Shaped[Tensor, " n"]]:
        """Return the blocks of the longest known beginning of ``keys``, and mark them as used."""
        found: list[Tensor] = []
        for key in keys:
            block = self._blocks.get(key)
            if block is None:
                break
            found.append(block)
        self._touch(keys[: len(found)])
        return found

    def keep(self, keys: Sequence[bytes], blocks: Mapping[bytes, Shaped[Tensor, " n"]], room: int) -> None:
        """Add those ``blocks`` of a text that are new; ``keys`` are the text's from its beginning.

        The least recently used blocks leave; ``room`` bounds all tokens. What does not fit is dropped from the text's
        end, which is of no use without its beginning.
        """
        most = max(0, min(self.max_tokens, room)) // BLOCK
        text = keys[:most]
        new = {key: blocks[key] for key in text if key in blocks and key not in self._blocks}
        self._touch([key for key in text if key in self._blocks])
        self.shrink((most - len(new)) * BLOCK)
        self._blocks.update(new)
        self._touch([key for key in text if key in self._blocks])

    def count(self, num_tokens: int, num_found: int) -> None:
        """Count a prompt of ``num_tokens``, ``num_found`` of which were copied."""
        self.num_queries += num_tokens
        self.num_hits += num_found

    def shrink(self, num_tokens: int) -> None:
        """Evict the least recently used blocks until at most ``num_tokens`` are left."""
        while self.num_tokens > max(0, num_tokens):
            self._blocks.popitem(last=False)
            self.num_evicted += 1

    def forget(self, keys: Sequence[bytes]) -> None:
        """Remove blocks that must not be used again."""
        for key in keys:
            self._blocks.pop(key, None)

    def clear(self) -> None:
        """Remove everything."""
        self._blocks.clear()

    def _touch(self, keys: Sequence[bytes]) -> None:
        """Mark blocks as used: the first of them as the last to leave, for the others are of no use without it."""
        for key in reversed(keys):
            self._blocks.move_to_end(key)
