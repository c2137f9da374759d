"""The stream's blocks as a worker receives them: requested early, so that its tasks start while the model loads."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
from ray.data import DataIterator

_PREFETCHED_BLOCKS = 2


def start_blocks(find_shard: Callable[[], DataIterator]) -> Iterator[pa.Table]:
    """Start the stream in a thread, so that its tasks start while the model loads; yield its blocks."""

    def first_block() -> tuple[pa.Table | None, Iterator[pa.Table]]:
        batches = find_shard().iter_batches(
            batch_size=None, batch_format="pyarrow", prefetch_batches=_PREFETCHED_BLOCKS
        )
        blocks = iter(batches)
        return next(blocks, None), blocks

    # A thread, because the first block waits for Ray Data's tasks to start: seconds in which the model can load.
    pool = ThreadPoolExecutor(1, "stream")
    started = pool.submit(first_block)
    pool.shutdown(wait=False)

    def blocks() -> Iterator[pa.Table]:
        first, rest = started.result()
        if first is not None:
            yield first
            yield from rest

    return blocks()
