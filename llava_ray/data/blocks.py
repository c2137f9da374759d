"""Blocks that stay whole: a table's rows as one row with one cell.

Ray Data cuts and joins blocks between their rows as it sees fit. What must arrive together and at one place travels as
one row; nothing is copied to make one or to read it.
"""

import pyarrow as pa

COLUMN = "rows"


def as_one_row(table: pa.Table) -> pa.Table:
    """Return a table of one row that holds all rows of ``table``, which has some."""
    rows = table.combine_chunks().to_struct_array().chunk(0)
    return pa.table({COLUMN: pa.ListArray.from_arrays(pa.array([0, len(rows)], pa.int32()), rows)})


def rows_of(block: pa.Table) -> pa.Table:
    """Return the rows that ``as_one_row`` laid together, of all of the block's rows."""
    return pa.Table.from_batches([pa.RecordBatch.from_struct_array(cell.flatten()) for cell in block[COLUMN].chunks])
