"""Rows that travel as one."""

import pyarrow as pa

from llava_ray.data.blocks import as_one_row, rows_of


def test_a_block_holds_its_rows_unchanged() -> None:
    table = pa.table({"ids": [["a"], [], ["b", "c"]], "pixels": pa.array([b"xyz", None, b""], pa.large_binary())})
    block = as_one_row(table)
    assert block.num_rows == 1
    assert rows_of(block).equals(table)


def test_blocks_that_were_joined_give_all_rows_in_order() -> None:
    table = pa.table({"step": pa.array(range(5), pa.int32())})
    joined = pa.concat_tables([as_one_row(table), as_one_row(table.slice(1, 2))])
    for block in (joined, joined.combine_chunks()):
        assert rows_of(block)["step"].to_pylist() == [0, 1, 2, 3, 4, 1, 2]


def test_a_slice_of_a_larger_block_gives_its_own_rows() -> None:
    table = pa.table({"step": pa.array(range(3), pa.int32())})
    joined = pa.concat_tables([as_one_row(table), as_one_row(table.slice(2, 1))]).combine_chunks()
    assert rows_of(joined.slice(1, 1))["step"].to_pylist() == [2]
