"""The layout of a preference's tokens in a row."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64


@dataclass(frozen=True)
class PairLengths:
    """The tokens of a preference, one behind the other: what both sides begin with, then the rest of each side.

    The rest of a side begins with the last token of the prompt, which predicts its answer's first.
    """

    shared: int
    chosen: int
    rejected: int

    @property
    def position_ids(self) -> Int64[np.ndarray, " t"]:
        """Return the position of each token in its own conversation."""
        first = self.shared + self.chosen
        return np.concatenate([np.arange(first), np.arange(self.shared, self.shared + self.rejected)])
