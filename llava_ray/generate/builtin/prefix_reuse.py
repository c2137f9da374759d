"""What running requests read from the cache of known text, and what they leave in it."""

from collections.abc import Iterable
from typing import Protocol, TypeVar, runtime_checkable

from llava_ray.generate.builtin.kv_cache import CacheSlot, KvCache
from llava_ray.generate.builtin.prefix_keys import BLOCK, BlockKeys
from llava_ray.generate.prompts import Prompt


@runtime_checkable
class ReadsPrompt(Protocol):
    """A request whose prompt is being read."""

    prompt: Prompt
    keys: BlockKeys
    row: CacheSlot | None
    num_read: int
    """Tokens of the prompt that are in its slot."""
    num_written: int
    """Tokens of prompt and answer that are in its slot."""
    num_reused: int
    """Of them, those copied from the cache."""
    new_ids: list[int]

    @property
    def reads_known(self) -> bool:
        """Return whether it copies what is known, in place of reading it."""


R = TypeVar("R", bound=ReadsPrompt)


def find_readers(kv: KvCache, running: Iterable[R]) -> list[R]:
    """Return the requests that read a part of their prompt in the next step, in order, after copying what is known.

    Of several that would read the same block only the first reads it: the others wait for it and copy.
    """
    readers: list[R] = []
    being_read: set[bytes] = set()
    for request in running:
        if request.num_read == len(request.prompt.ids):
            continue
        if request.reads_known:
            load_prefix(kv, request)
        next_key = _next_key(kv, request)
        if next_key is None or next_key not in being_read or not request.reads_known:
            readers.append(request)
        if next_key is not None:
            being_read.add(next_key)
    return readers


def load_prefix(kv: KvCache, request: ReadsPrompt) -> None:
    """Copy the known blocks that come next in a request's prompt to its slot, all but the prompt's last token."""
    start, end = request.num_read // BLOCK, (len(request.prompt.ids) - 1) // BLOCK
    if not kv.prefixes.is_on or request.num_read % BLOCK or start >= end:
        return
    assert request.row is not None
    keys = request.keys
    if keys.first(start + 1)[start] in kv.prefixes:  # the keys of all the others cost time
        count = kv.load_prefix(request.row, request.num_read, keys.first(end)[start:])
        request.num_reused += count
        request.num_read += count
        request.num_written = request.num_read


def keep_prefix(kv: KvCache, request: ReadsPrompt) -> None:
    """Keep the whole blocks of a request's slot in the cache."""
    if kv.prefixes.is_on and request.row is not None:
        kv.keep_prefix(request.row, _written_keys(request))


def forget_prefix(kv: KvCache, request: ReadsPrompt) -> None:
    """Remove what a request left in the cache: it cannot be trusted."""
    if kv.prefixes.is_on:
        kv.prefixes.forget(_written_keys(request))


def _written_keys(request: ReadsPrompt) -> list[bytes]:
    """Return the keys of a slot's whole blocks. A draft may have written tokens beyond the end of the answer."""
    num_tokens = min(request.num_written, len(request.prompt.ids) + len(request.new_ids))
    return request.keys.first(num_tokens // BLOCK, request.new_ids)


def _next_key(kv: KvCache, request: ReadsPrompt) -> bytes | None:
    """Return the key of the block that a request reads next and could as well copy; None if there is none."""
    place, end = request.num_read // BLOCK, (len(request.prompt.ids) - 1) // BLOCK
    if not kv.prefixes.is_on or request.num_read % BLOCK or place >= end:
        return None
    return request.keys.first(place + 1)[place]
