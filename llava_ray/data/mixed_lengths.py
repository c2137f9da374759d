"""Token lengths of a mixture: those of its sources one after the other, examples and shards numbered through all."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import pyarrow as pa
from jaxtyping import Int

from llava_ray.data.shards import PreparedData
from llava_ray.data.token_lengths import TokenLengths


@dataclass(frozen=True)
class MixedLengths(TokenLengths):
    """The lengths of each source, read from its own file."""

    parts: tuple[TokenLengths, ...] = ()
    first_examples: tuple[int, ...] = ()
    """The number of each source's first example, and of the first after all."""
    first_shards: tuple[int, ...] = ()

    @classmethod
    def of(cls, parts: Sequence[TokenLengths], sizes: Sequence[int], prepared: PreparedData) -> "MixedLengths":
        """Join the lengths of ``prepared.sources``, of ``sizes`` examples each."""
        return cls(
            path=", ".join(part.path for part in parts),
            num_rejected=sum(part.num_rejected for part in parts),
            num_truncated=sum(part.num_truncated for part in parts),
            parts=tuple(parts),
            first_examples=tuple(accumulate(sizes, initial=0)),
            first_shards=tuple(accumulate((len(source.shards) for source in prepared.sources), initial=0)),
        )

    def column(self, name: str) -> np.ndarray:
        """Return one column as an array of n."""
        columns = [part.column(name) for part in self.parts]
        if name == "shard":
            columns = [column + np.int32(first) for column, first in zip(columns, self.first_shards, strict=False)]
        return np.concatenate(columns)

    def take(self, examples: Int[np.ndarray, " m"], columns: Sequence[str]) -> pa.Table:
        """Return some columns of ``examples``, in their order, from only the parts of the files that hold them."""
        owner = np.searchsorted(self.first_examples, examples, side="right") - 1
        tables, places = [], []
        for number in np.unique(owner).tolist():
            mine = np.flatnonzero(owner == number)
            table = self.parts[number].take(examples[mine] - self.first_examples[number], columns)
            if "shard" in columns:
                shards = table.column("shard").to_numpy() + np.int32(self.first_shards[number])
                table = table.set_column(table.column_names.index("shard"), "shard", pa.array(shards))
            tables.append(table)
            places.append(mine)
        return pa.concat_tables(tables).take(np.argsort(np.concatenate(places), kind="stable"))
