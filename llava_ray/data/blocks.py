"""The stream's blocks: each packed into a single row, and started early.

Ray Data splits and merges blocks between rows at will. Micro-batches that must arrive together at one rank therefore
travel as one row of one cell; packing and unpacking copy nothing.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
from ray.data import DataIterator

_COLUMN = "rows"
_PREFETCHED_BLOCKS = 2


def pack_block(table: pa.Table) -> pa.Table:
    """Pack all rows of ``table``, which is not empty, into a table of one row."""
    rows = table.combine_chunks().to_struct_array().chunk(0)
    return pa.table({_COLUMN: pa.ListArray.from_arrays(pa.array([0, len(rows)], pa.int32()), rows)})


def unpack_block(block: pa.Table) -> pa.Table:
    """Unpack the rows of every cell that ``pack_block`` built."""
    return pa.Table.from_batches([pa.RecordBatch.from_struct_array(cell.flatten()) for cell in block[_COLUMN].chunks])


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
