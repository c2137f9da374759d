"""The KV cache of the running requests: slots of a few lengths, in tensors that are written in place.

A request reserves a slot for all it may need, prompt and new tokens, so it never has to be evicted to make room for
others. Slots of one length form a size class, one tensor per layer, over which attention runs as one batch; their
indices stay without gaps, so that a step reads a slice of it and copies nothing. That is why the last slot moves into
a freed one: the copy is paid once per request, a gather over gaps would be paid at every step.
"""

from dataclasses import dataclass, field

from jaxtyping import Float
from torch import Tensor

SHORTEST = 128  # tokens; longer slots are these times 1, 1.5, 2, 3, 4, 6, ...: at most a third of a slot is unused
_FIRST_ROWS = 4  # of a new size class, which doubles when it is full


def slot_length(num_tokens: int) -> int:
    """Return the length of the shortest slot that holds so many tokens."""
    length = SHORTEST
    while length < num_tokens:
        length = length * 3 // 2 if length & (length - 1) == 0 else length * 4 // 3
    return length


def longest_slot(num_tokens: int) -> int:
    """Return the length of the longest slot of at most so many tokens; 0 if there is none."""
    longest, length = 0, SHORTEST
    while length <= num_tokens:
        longest, length = length, slot_length(length + 1)
    return longest


@dataclass(eq=False)
class CacheSlot:
    """A request's slot; ``index`` changes when another slot of its size class is freed."""

    size_class: "SizeClass"
    index: int


@dataclass
class LayerCache:
    """Keys and values of one layer of a size class."""

    keys: Float[Tensor, "rows heads length d"]
    values: Float[Tensor, "rows heads length e"]


@dataclass(eq=False)
class SizeClass:
    """All slots of one length. ``layers`` are allocated when the model's layers first write to them."""

    length: int
    num_slots: int = 0
    """Slots that memory is allocated for."""
    rows: list[CacheSlot] = field(default_factory=list)
    layers: dict[int, LayerCache] = field(default_factory=dict)

    def layer(self, index: int, keys: Float[Tensor, "1 heads t d"], values: Float[Tensor, "1 heads t e"]) -> LayerCache:
        """Return a layer's cache, allocated for keys and values like these."""
        if index not in self.layers:
            # Zeros: masked positions are multiplied by 0, and 0 times a NaN of uninitialised memory stays NaN.
            made = [
                like.new_zeros(self.num_slots, like.shape[1], self.length, like.shape[3]) for like in (keys, values)
            ]
            self.layers[index] = LayerCache(*made)
        return self.layers[index]

    def resize(self, num_slots: int) -> None:
        """Allocate or free slots beyond those in use."""
        if num_slots == self.num_slots:
            return
        self.num_slots = num_slots
        if not num_slots:
            self.layers.clear()
        for layer in self.layers.values():  # one by one: only one layer is in memory twice at a time
            layer.keys = _resized(layer.keys, num_slots, len(self.rows))
            layer.values = _resized(layer.values, num_slots, len(self.rows))

    def clear(self, index: int) -> None:
        """Zero a freed slot: attention multiplies it by 0, and 0 times NaN stays NaN."""
        for layer in self.layers.values():
            layer.keys[index] = 0
            layer.values[index] = 0

    def move(self, source: int, target: int) -> None:
        """Copy one slot over another."""
        for layer in self.layers.values():
            layer.keys[target] = layer.keys[source]
            layer.values[target] = layer.values[source]


class KvCache:
    """All size classes, bounded in tokens: their slots together never hold more than ``capacity``."""

    def __init__(self, capacity: int) -> None:
        """Initialise an empty cache; memory is allocated on demand."""
        self.capacity = capacity
        self.num_reserved = 0
        """Tokens of all slots in use."""
        self.size_classes: dict[int, SizeClass] = {}

    @property
    def num_allocated(self) -> int:
        """Return the number of tokens that memory is allocated for."""
        return sum(size_class.length * size_class.num_slots for size_class in self.size_classes.values())

    def reserve(self, num_tokens: int) -> CacheSlot | None:
        """Reserve a slot for so many tokens; return None while there is no room."""
        length = slot_length(num_tokens)
        if self.num_reserved + length > self.capacity:
            return None
        size_class = self.size_classes.setdefault(length, SizeClass(length))
        if len(size_class.rows) == size_class.num_slots:
            self._grow(size_class)
        row = CacheSlot(size_class, len(size_class.rows))
        size_class.rows.append(row)
        self.num_reserved += length
        return row

    def release(self, row: CacheSlot) -> None:
        """Free a slot; the last one of its size class moves into it."""
        size_class = row.size_class
        self.num_reserved -= size_class.length
        last = size_class.rows.pop()
        freed = last.index
        if last is not row:
            size_class.move(last.index, row.index)
            last.index = row.index
            size_class.rows[last.index] = last
        size_class.clear(freed)

    def _grow(self, size_class: SizeClass) -> None:
        """Double a full size class, or as far as the capacity allows, freeing unused slots of the others."""
        wanted = max(_FIRST_ROWS, 2 * size_class.num_slots)
        if self.num_allocated + (wanted - size_class.num_slots) * size_class.length > self.capacity:
            for other in self.size_classes.values():
                if other is not size_class:
                    other.resize(len(other.rows))
        room = (self.capacity - self.num_allocated) // size_class.length
        size_class.resize(min(wanted, size_class.num_slots + room))


def _resized(old: Float[Tensor, "rows heads length d"], num_slots: int, num_used: int) -> Tensor:
    new = old.new_zeros(num_slots, *old.shape[1:])
    new[:num_used] = old[:num_used]
    return new
