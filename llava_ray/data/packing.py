"""The rows of the stream: a micro-batch as one Arrow row, its images as one cell, a block of rows as one row.

Ray Data splits and merges blocks between rows at will. Micro-batches that must arrive together at one rank therefore
travel as one row of one cell; packing and unpacking copy nothing. The writer of a cell and its reader are
side by side here.

Ray's own processes import this module: torch is imported by the two functions that need it.
"""

from collections.abc import Callable, Mapping
from dataclasses import astuple
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from llava_ray.chat.conversation import IGNORE_INDEX
from llava_ray.data.examples import Example
from llava_ray.data.feature_cache import location_key
from llava_ray.data.pair_lengths import PairLengths

if TYPE_CHECKING:
    import torch

# Consecutive micro-batches of one rank per block. With 1 the stream reached 30 % of the images/s of a bare decoding
# loop, with 16 it reached 74 %; more would only delay the first step.
ROWS_PER_BLOCK = 16

# Marks the rows that fill a rank's last block.
NO_STEP = -1

# Of a whole step: supervised tokens of conversations, preferences, supervised tokens of their chosen answers.
STEP_TOTALS = ("num_supervised", "num_pairs", "num_chosen")

PACKED_SCHEMA = pa.schema(
    {
        "step": pa.int32(),
        "rank": pa.int32(),
        **{name: pa.int32() for name in STEP_TOTALS},
        "num_micro_batches": pa.int32(),
        "ids": pa.list_(pa.string()),
        "sources": pa.list_(pa.int32()),  # of a mixture: the number of each sample's source
        "num_tokens": pa.list_(pa.int32()),
        "input_ids": pa.list_(pa.int32()),
        "labels": pa.list_(pa.int32()),
        "images": pa.list_(pa.large_binary()),
        "image_sizes": pa.list_(pa.list_(pa.int32(), 2)),  # (width, height) of each
        "places": pa.list_(pa.int64()),  # of each in the feature cache
        "pairs": pa.list_(pa.list_(pa.int32())),  # of each sample: a preference's lengths, [] for a conversation
        "reference": pa.list_(pa.float64()),  # the reference's log-probabilities, two of each preference
    }
)

_COLUMN = "rows"


def pack_block(table: pa.Table) -> pa.Table:
    """Pack all rows of ``table``, which is not empty, into a table of one row."""
    rows = table.combine_chunks().to_struct_array().chunk(0)
    return pa.table({_COLUMN: pa.ListArray.from_arrays(pa.array([0, len(rows)], pa.int32()), rows)})


def unpack_block(block: pa.Table) -> pa.Table:
    """Unpack the rows of every cell that ``pack_block`` built."""
    return pa.Table.from_batches([pa.RecordBatch.from_struct_array(cell.flatten()) for cell in block[_COLUMN].chunks])


def pack_micro_batch(
    descriptor: Mapping[str, Any],
    records: Mapping[tuple[int, int], Mapping[str, Any]],
    encode: Callable[[Mapping[str, Any]], list[Example]],
) -> dict[str, Any]:
    """Pack the examples that a descriptor names into a row of PACKED_SCHEMA, one behind the other."""
    examples, ids, sources, images, shown, places = [], [], [], [], [], []
    named = (descriptor[key] for key in ("shard", "row", "part", "num_tokens"))
    for shard, number, part, num_tokens in zip(*named, strict=True):
        record = records[shard, number]
        sizes = list(zip(record["widths"], record["heights"], strict=True))
        example = encode(record)[part]
        if len(example.input_ids) != num_tokens:
            raise AssertionError(f"{record['id']}: {len(example.input_ids)} tokens, the plan says {num_tokens}")
        examples.append(example)
        ids.append(record["id"])
        sources.append(record.get("source_number", 0))
        images += [record["images"][i] for i in example.images if "images" in record]
        shown += [sizes[i] for i in example.images]
        places += [location_key(shard, number, i) for i in example.images]
    names = ("step", "rank", *STEP_TOTALS, "num_micro_batches", "num_tokens", "reference")
    common = {name: descriptor[name] for name in names}
    return common | {
        "ids": ids,
        "sources": sources,
        "input_ids": np.concatenate([e.input_ids for e in examples]) if examples else [],
        "labels": np.concatenate([e.labels for e in examples]) if examples else [],
        "images": images,
        "image_sizes": shown,
        "places": places,
        "pairs": [astuple(e.pair) if e.pair else () for e in examples],
    }


def unpack_tokens(row: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return a row's input ids, position ids and labels, each int64 of (t,).

    A rank that has nothing to do in a round still takes part in it, with one token and no weight.
    """
    input_ids = np.asarray(row["input_ids"] or [0], np.int64)
    labels = np.asarray(row["labels"] or [IGNORE_INDEX], np.int64)
    pairs = row["pairs"] or [()] * len(row["num_tokens"])
    positions = [
        PairLengths(*pair).position_ids if pair else np.arange(count)
        for count, pair in zip(row["num_tokens"], pairs, strict=True)
    ]
    return input_ids, np.concatenate(positions or [np.arange(1)]), labels


def replace_cells(table: pa.Table, column: str, name: str, cells: list[bytes]) -> pa.Table:
    """Return the table with a column of cells, named ``name``, in the place of ``column``."""
    return table.set_column(table.column_names.index(column), name, pa.array(cells, pa.large_binary()))


def unpack_pixels(cell: bytes, height: int, width: int) -> np.ndarray:
    """Return the (n, 3, h, w) uint8 pixels of a cell of views, one behind the other; n may be 0."""
    # A copy, because a view of shared memory is read-only and torch wants none such.
    return np.frombuffer(cell, np.uint8).reshape(-1, 3, height, width).copy()


def pack_features(features: "torch.Tensor") -> bytes:
    """Return a cell of the (n, p, v) features of n views, in their own dtype; empty for n = 0."""
    import torch

    return features.contiguous().view(torch.uint8).numpy().tobytes() if len(features) else b""


def unpack_features(cell: bytes, *, bf16: bool, num_features: int, width: int) -> "torch.Tensor":
    """Return the (n, p, v) features of a cell, which has some."""
    import torch

    flat = torch.frombuffer(bytearray(cell), dtype=torch.bfloat16 if bf16 else torch.float32)
    return flat.view(-1, num_features, width)
