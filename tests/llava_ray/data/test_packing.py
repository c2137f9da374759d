"""What the stream's rows and cells hold after they were written and read."""

import numpy as np
import pyarrow as pa
import pytest
import torch

from llava_ray.data.examples import Example
from llava_ray.data.feature_cache import location_key
from llava_ray.data.packing import (
    PACKED_SCHEMA,
    pack_block,
    pack_features,
    pack_micro_batch,
    unpack_block,
    unpack_features,
    unpack_pixels,
    unpack_tokens,
)

ONE_TOKEN = Example(np.array([8], np.int32), np.array([8], np.int32), ())
THREE_TOKENS = Example(np.array([1, 5, 6], np.int32), np.array([-100, 5, 6], np.int32), (1,))


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


def test_pixels_come_out_as_they_went_in_and_may_be_written_to() -> None:
    views = np.arange(2 * 3 * 4 * 5, dtype=np.uint8).reshape(2, 3, 4, 5)
    read = unpack_pixels(views.tobytes(), 4, 5)
    assert np.array_equal(read, views)
    assert read.flags.writeable
    assert unpack_pixels(b"", 4, 5).shape == (0, 3, 4, 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_features_come_out_bit_for_bit(dtype: torch.dtype) -> None:
    features = torch.randn(2, 3, 4).to(dtype)
    read = unpack_features(pack_features(features), bf16=dtype == torch.bfloat16, num_features=3, width=4)
    assert read.dtype == dtype and torch.equal(read, features)
    assert pack_features(features[:0]) == b""


def test_a_micro_batch_is_packed_and_read_again() -> None:
    examples = [THREE_TOKENS, ONE_TOKEN]
    record = {"id": "a", "turns": [], "widths": [4, 6], "heights": [3, 5], "images": [b"x", b"y"]}
    descriptor = {"shard": [2, 2], "row": [7, 7], "part": [0, 1], "num_tokens": [3, 1]}
    descriptor |= {
        "step": 4,
        "rank": 1,
        "num_supervised": 9,
        "num_micro_batches": 2,
        "num_pairs": 0,
        "num_chosen": 0,
        "reference": [],
    }
    packed = pack_micro_batch(descriptor, {(2, 7): record}, lambda row: examples)
    row = pa.Table.from_pylist([packed], schema=PACKED_SCHEMA).to_pylist()[0]
    assert (row["ids"], row["images"], row["image_sizes"]) == (["a", "a"], [b"y"], [[6, 5]])
    assert row["places"] == [location_key(2, 7, 1)]
    input_ids, position_ids, labels = unpack_tokens(row)
    assert input_ids.tolist() == [1, 5, 6, 8]
    assert position_ids.tolist() == [0, 1, 2, 0]
    assert labels.tolist() == [-100, 5, 6, 8]


def test_a_rank_without_work_gets_one_token_of_no_weight() -> None:
    descriptor = {name: [] for name in ("shard", "row", "part", "num_tokens")}
    descriptor |= {
        "step": 0,
        "rank": 0,
        "num_supervised": 1,
        "num_micro_batches": 1,
        "num_pairs": 0,
        "num_chosen": 0,
        "reference": [],
    }
    packed = pack_micro_batch(descriptor, {}, lambda row: [])
    row = pa.Table.from_pylist([packed], schema=PACKED_SCHEMA).to_pylist()[0]
    assert [values.tolist() for values in unpack_tokens(row)] == [[0], [0], [-100]]
