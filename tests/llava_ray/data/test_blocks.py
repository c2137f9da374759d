"""Rows that travel as one."""

import pyarrow as pa

from llava_ray.data.blocks import pack_block, unpack_block


def test_a_block_holds_its_rows_unchanged() -> None:
    table = pa.table({"ids": [["a"], [], ["b", "c"]], "pixels": pa.array([b"xyz", None, b""], pa.large_binary())})
    block = pack_block(table)
    assert block.num_rows == 1
    assert unpack_block(block).equals(table)


def test_blocks_that_were_joined_give_all_rows_in_order() -> None:
    table = pa.table({"step": pa.array(range(5), pa.int32())})
    joined = pa.concat_tables([pack_block(table), pack_block(table.slice(1, 2))])
    for block in (joined, joined.combine_chunks()):
        assert unpack_block(block)["step"].to_pylist() == [0, 1, 2, 3, 4, 1, 2]


def test_a_slice_of_a_larger_block_gives_its_own_rows() -> None:
    table = pa.table({"step": pa.array(range(3), pa.int32())})
    joined = pa.concat_tables([pack_block(table), pack_block(table.slice(2, 1))]).combine_chunks()
    assert unpack_block(joined.slice(1, 1))["step"].to_pylist() == [2]
