"""The reference's log-probabilities of each preference, beside the lengths of the same examples in the same order.

Tasks of the stream read them, so nothing here imports Ray or torch.
"""

import io
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float, Int

from llava_ray.data.shards import ROWS_PER_GROUP, read_shard_rows
from llava_ray.data.storage import file_size, write_stored

_FILE = "reference.parquet"
_SIDES = ("chosen", "rejected")


@dataclass(frozen=True)
class ReferenceFiles:
    """Where the log-probabilities are: the folder of each source, None for one of conversations.

    ``first_examples`` are the numbers of each source's first example.
    """

    folders: tuple[str | None, ...]
    first_examples: tuple[int, ...] = (0,)

    def take(self, examples: Int[np.ndarray, " m"]) -> Float[np.ndarray, "m 2"]:
        """Return the log-probabilities of some examples, in their order; zeros of conversations. Raises DataError."""
        found = np.zeros((len(examples), 2))
        owner = np.searchsorted(self.first_examples, examples, side="right") - 1
        for number, folder in enumerate(self.folders):
            mine = np.flatnonzero(owner == number)
            if folder is not None and len(mine):
                found[mine] = take_reference(folder, examples[mine] - self.first_examples[number])
        return found


def has_reference(folder: str) -> bool:
    """Return whether a folder holds the log-probabilities of every example."""
    return file_size(f"{folder}/{_FILE}") is not None


def write_reference(folder: str, log_probabilities: Float[np.ndarray, "n 2"]) -> None:
    """Write the natural log-probability of the chosen and of the rejected answer of each example."""
    sink = io.BytesIO()
    table = pa.table({name: log_probabilities[:, side] for side, name in enumerate(_SIDES)})
    pq.write_table(table, sink, row_group_size=64 * ROWS_PER_GROUP)
    write_stored(f"{folder}/{_FILE}", sink.getvalue())


def take_reference(folder: str, examples: Int[np.ndarray, " m"]) -> Float[np.ndarray, "m 2"]:
    """Return the log-probabilities of some examples, in their order. Raises DataError where they cannot be read."""
    table = read_shard_rows(folder, _FILE, examples, columns=_SIDES)
    return np.stack([table.column(name).to_numpy() for name in _SIDES], axis=1)
