"""The KV cache of the running requests: slots of a few lengths, in tensors that are written in place.

A request reserves a slot for all it may need, prompt and new tokens, so it never has to be evicted to make room for
others. Slots of one length form a size class, one tensor per layer, over which attention runs as one batch; their
indices stay without gaps, so that a step reads a slice of it and copies nothing. That is why the last slot moves into
a freed one: the copy is paid once per request, a gather over gaps would be paid at every step.

What no slot needs holds blocks of text that was read before (``prefix_cache``), which leave when a slot needs it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from llava_ray.generate.builtin.prefix_cache import PrefixCache
from llava_ray.generate.builtin.prefix_keys import BLOCK

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
    shapes: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Keys and values of no token of each layer, shared by all size classes: for slots that a prefix is copied into
    before a layer has written to any of them."""

    def layer(self, index: int, keys: Float[Tensor, "1 heads t d"], values: Float[Tensor, "1 heads t e"]) -> LayerCache:
        """Return a layer's cache, allocated for keys and values like these."""
        if index not in self.layers:
            # Zeros: masked positions are multiplied by 0, and 0 times a NaN of uninitialised memory stays NaN.
            made = [
                like.new_zeros(self.num_slots, like.shape[1], self.length, like.shape[3]) for like in (keys, values)
            ]
            self.layers[index] = LayerCache(*made)
            self.shapes.setdefault(index, (keys[:, :, :0].clone(), values[:, :, :0].clone()))
        return self.layers[index]

    def read_blocks(self, index: int, start: int, count: int) -> list[Shaped[Tensor, " n"]]:
        """Copy ``count`` blocks from position ``start`` of a slot, each with its keys and values of all layers."""
        spans = [tensor[index, :, start : start + count * BLOCK] for tensor in self._tensors()]
        flat = torch.cat([span.unflatten(1, (count, BLOCK)).transpose(0, 1).reshape(count, -1) for span in spans], 1)
        return [flat[place].clone() for place in range(count)]  # views would keep the memory of all of them

    def write_blocks(self, index: int, start: int, blocks: Sequence[Shaped[Tensor, " n"]]) -> None:
        """Copy blocks to position ``start`` of a slot."""
        for layer, (keys, values) in self.shapes.items():
            self.layer(layer, keys, values)
        flat, first, count = torch.stack(list(blocks)), 0, len(blocks)
        for tensor in self._tensors():
            size = tensor.shape[1] * BLOCK * tensor.shape[3]
            part = flat[:, first : first + size].view(count, tensor.shape[1], BLOCK, tensor.shape[3])
            tensor[index, :, start : start + count * BLOCK] = part.transpose(0, 1).flatten(1, 2)
            first += size

    def _tensors(self) -> Iterator[Float[Tensor, "rows heads length d"]]:
        """Yield all tensors, in the order in which blocks hold them."""
        for layer in sorted(self.layers):
            yield from (self.layers[layer].keys, self.layers[layer].values)

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
    """All size classes and the blocks of known text: together they never hold more than ``capacity`` tokens."""

    def __init__(self, capacity: int, max_prefix_tokens: int = 0) -> None:
        """Initialise an empty cache; memory is allocated on demand. Known text takes ``max_prefix_tokens`` at most."""
        self.capacity = capacity
        self.num_reserved = 0
        """Tokens of all slots in use."""
        self.size_classes: dict[int, SizeClass] = {}
        self.prefixes = PrefixCache(min(max_prefix_tokens, capacity))
        self._shapes: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def num_allocated(self) -> int:
        """Return the number of tokens of slots that memory is allocated for."""
        return sum(size_class.length * size_class.num_slots for size_class in self.size_classes.values())

    def reserve(self, num_tokens: int) -> CacheSlot | None:
        """Reserve a slot for so many tokens; return None while there is no room."""
        length = slot_length(num_tokens)
        if self.num_reserved + length > self.capacity:
            return None
        size_class = self.size_classes.setdefault(length, SizeClass(length, shapes=self._shapes))
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

    def load_prefix(self, row: CacheSlot, start: int, keys: Sequence[bytes]) -> int:
        """Copy the longest known beginning of ``keys`` to position ``start`` of a slot; return its number of tokens."""
        blocks = self.prefixes.find(keys)
        if blocks:
            row.size_class.write_blocks(row.index, start, blocks)
        return len(blocks) * BLOCK

    def keep_prefix(self, row: CacheSlot, keys: Sequence[bytes]) -> None:
        """Keep those first blocks of a slot, one for each key, that are not known yet, as far as there is room."""
        unknown = next((place for place, key in enumerate(keys) if key not in self.prefixes), len(keys))
        if unknown == len(keys) or not self.prefixes.is_on:
            return
        if self._num_free < (len(keys) - unknown) * BLOCK:
            self._free_unused(only_empty=True)
        room = self.capacity - self.num_allocated
        keys = keys[: min(room, self.prefixes.max_tokens) // BLOCK]
        new = keys[unknown:]
        if new:
            blocks = row.size_class.read_blocks(row.index, unknown * BLOCK, len(new))
            self.prefixes.keep(keys, dict(zip(new, blocks, strict=True)), room)

    def clear(self) -> None:
        """Free all memory."""
        self.size_classes.clear()
        self.prefixes.clear()

    def _grow(self, size_class: SizeClass) -> None:
        """Double a full size class, or as far as the capacity allows, freeing what is not in use for one more slot."""
        wanted, length = max(_FIRST_ROWS, 2 * size_class.num_slots), size_class.length
        if self._num_free < (wanted - size_class.num_slots) * length:
            self._free_unused(but=size_class)
        needed = length * max(1, size_class.num_slots // 4)  # fewer at a time would copy the others for each
        if self._num_free < needed:
            self.prefixes.shrink(self.capacity - self.num_allocated - needed)
        room = self._num_free // length
        size_class.resize(min(wanted, size_class.num_slots + room))

    @property
    def _num_free(self) -> int:
        return self.capacity - self.num_allocated - self.prefixes.num_tokens

    def _free_unused(self, but: SizeClass | None = None, *, only_empty: bool = False) -> None:
        """Free slots that no request has; with ``only_empty``, those of sizes without any, which needs no copying."""
        for other in self.size_classes.values():
            if other is not but and not (only_empty and other.rows):
                other.resize(len(other.rows))


def _resized(old: Float[Tensor, "rows heads length d"], num_slots: int, num_used: int) -> Tensor:
    new = old.new_zeros(num_slots, *old.shape[1:])
    new[:num_used] = old[:num_used]
    return new
