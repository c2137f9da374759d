"""Keys and values of the running requests: rows of a few lengths, in tensors that are written in place.

A request reserves a row for all it may need, prompt and new tokens, so it never has to be moved or evicted to make
room for others. Rows of one length share a shelf, one tensor a layer, over which attention runs as one batch; their
indices stay without gaps, so that a step reads a slice of it and copies nothing.
"""

from dataclasses import dataclass, field

from jaxtyping import Float
from torch import Tensor

SHORTEST = 128  # tokens; longer rows are these times 1, 1.5, 2, 3, 4, 6, ...: at most a third of a row is never used
_FIRST_ROWS = 4  # of a new shelf, which doubles when it is full


def row_length(num_tokens: int) -> int:
    """Return the length of the shortest row that holds so many tokens."""
    length = SHORTEST
    while length < num_tokens:
        length = length * 3 // 2 if length & (length - 1) == 0 else length * 4 // 3
    return length


def longest_row(num_tokens: int) -> int:
    """Return the length of the longest row that takes at most so many tokens; 0 if none does."""
    longest, length = 0, SHORTEST
    while length <= num_tokens:
        longest, length = length, row_length(length + 1)
    return longest


@dataclass(eq=False)
class CacheSlot:
    """A request's place; ``index`` changes when a row before it leaves."""

    shelf: "SizeClass"
    index: int


@dataclass
class LayerCache:
    """Keys and values of one layer of a shelf."""

    keys: Float[Tensor, "rows heads length d"]
    values: Float[Tensor, "rows heads length e"]


@dataclass(eq=False)
class SizeClass:
    """All rows of one length. ``layers`` come into being as the model's layers first write to them."""

    length: int
    num_slots: int = 0
    """Rows that memory is held for."""
    rows: list[CacheSlot] = field(default_factory=list)
    layers: dict[int, LayerCache] = field(default_factory=dict)

    def layer(self, index: int, keys: Float[Tensor, "1 heads t d"], values: Float[Tensor, "1 heads t e"]) -> LayerCache:
        """Return a layer's cache, made for keys and values like these."""
        if index not in self.layers:
            # Zeros: what attention masks is multiplied by 0, which leaves a NaN of unwritten memory as it is.
            made = [
                like.new_zeros(self.num_slots, like.shape[1], self.length, like.shape[3]) for like in (keys, values)
            ]
            self.layers[index] = LayerCache(*made)
        return self.layers[index]

    def resize(self, num_places: int) -> None:
        """Make or give up places beyond the rows in use."""
        if num_places == self.num_slots:
            return
        self.num_slots = num_places
        if not num_places:
            self.layers.clear()
        for layer in self.layers.values():  # one after the other: only one layer is held twice at a time
            layer.keys = _resized(layer.keys, num_places, len(self.rows))
            layer.values = _resized(layer.values, num_places, len(self.rows))

    def clear(self, index: int) -> None:
        """Write zeros over a row that nobody uses: attention multiplies it by 0, which leaves a NaN as it is."""
        for layer in self.layers.values():
            layer.keys[index] = 0
            layer.values[index] = 0

    def move(self, source: int, target: int) -> None:
        """Copy one row over another."""
        for layer in self.layers.values():
            layer.keys[target] = layer.keys[source]
            layer.values[target] = layer.values[source]


class KvCache:
    """The shelves, bounded in tokens: their places together never hold more than ``capacity``."""

    def __init__(self, capacity: int) -> None:
        """Allocate nothing yet."""
        self.capacity = capacity
        self.num_reserved = 0
        """Tokens of all rows in use."""
        self.shelves: dict[int, SizeClass] = {}

    @property
    def num_allocated(self) -> int:
        """Count the tokens that memory is held for."""
        return sum(shelf.length * shelf.num_slots for shelf in self.shelves.values())

    def reserve(self, num_tokens: int) -> CacheSlot | None:
        """Return a row for so many tokens, or None while there is no room."""
        length = row_length(num_tokens)
        if self.num_reserved + length > self.capacity:
            return None
        shelf = self.shelves.setdefault(length, SizeClass(length))
        if len(shelf.rows) == shelf.num_slots:
            self._grow(shelf)
        row = CacheSlot(shelf, len(shelf.rows))
        shelf.rows.append(row)
        self.num_reserved += length
        return row

    def release(self, row: CacheSlot) -> None:
        """Free a row; the last one of its shelf takes its place."""
        shelf = row.shelf
        self.num_reserved -= shelf.length
        last = shelf.rows.pop()
        freed = last.index
        if last is not row:
            shelf.move(last.index, row.index)
            last.index = row.index
            shelf.rows[last.index] = last
        shelf.clear(freed)

    def _grow(self, shelf: SizeClass) -> None:
        """Double a full shelf, or as far as the capacity allows, taking unused places from the others."""
        wanted = max(_FIRST_ROWS, 2 * shelf.num_slots)
        if self.num_allocated + (wanted - shelf.num_slots) * shelf.length > self.capacity:
            for other in self.shelves.values():
                if other is not shelf:
                    other.resize(len(other.rows))
        room = (self.capacity - self.num_allocated) // shelf.length
        shelf.resize(min(wanted, shelf.num_slots + room))


def _resized(old: Float[Tensor, "rows heads length d"], num_places: int, num_used: int) -> Tensor:
    new = old.new_zeros(num_places, *old.shape[1:])
    new[:num_used] = old[:num_used]
    return new
