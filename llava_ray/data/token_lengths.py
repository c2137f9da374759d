"""Token lengths as they are read from storage, column by column: ids of samples never leave the file.

Ray's own processes pass ``TokenLengths`` on and tasks of the stream read it, so nothing here imports Ray or torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Int

from llava_ray.data.shards import read_shard_rows
from llava_ray.errors import DataError
from llava_ray.images.reading import open_filesystem

LENGTHS_FILE = "lengths.parquet"

SCHEMA = pa.schema(
    {
        "shard": pa.int32(),
        "row": pa.int32(),
        "part": pa.int32(),
        "id": pa.string(),
        "num_tokens": pa.int32(),
        "num_supervised": pa.int32(),
        "num_chosen": pa.int32(),  # of them, in a preference's chosen answer; 0 for a conversation
        "num_images": pa.int32(),
        "truncated": pa.bool_(),
    }
)


@dataclass(frozen=True)
class TokenLengths:
    """The lengths in the folder ``path``: one row per example (see SCHEMA), in shard order."""

    path: str
    num_rejected: int
    num_truncated: int

    @classmethod
    def open(cls, path: str, settings: str | None = None) -> "TokenLengths":
        """Open the lengths of a folder.

        Raises DataError where they cannot be read, or were counted with other settings than those of the key
        ``settings``: another tokenizer, template or length rule.
        """
        files, place = open_filesystem(f"{path}/{LENGTHS_FILE}")
        try:
            with pq.ParquetFile(place, filesystem=files) as file:
                noted = file.metadata.metadata or {}
                rejected, counted_with = int(noted.get(b"rejected", b"0")), noted.get(b"settings", b"").decode()
                truncated = sum(batch.column(0).true_count for batch in file.iter_batches(columns=["truncated"]))
        except (pa.ArrowInvalid, OSError, ValueError, KeyError) as error:
            raise DataError(
                f"token lengths {path}/{LENGTHS_FILE} cannot be read ({error}); delete the folder {path}, and they are "
                "counted again"
            ) from error
        if settings and counted_with and counted_with != settings:  # files of earlier versions do not say
            raise DataError(
                f"token lengths {path}/{LENGTHS_FILE} were counted with another tokenizer, template or length rule "
                f"(settings {counted_with}, expected {settings}): a copied or renamed folder; delete {path}, and they "
                "are counted again"
            )
        return cls(path, rejected, truncated)

    def column(self, name: str) -> np.ndarray:
        """Return one column as an array of n."""
        return read_shard_rows(self.path, LENGTHS_FILE, None, columns=[name]).column(name).to_numpy()

    def take(self, examples: Int[np.ndarray, " m"], columns: Sequence[str]) -> pa.Table:
        """Return some columns of ``examples``, in their order, from only the parts of the file that hold them."""
        return read_shard_rows(self.path, LENGTHS_FILE, examples, columns=columns)
