"""The loss of each source of a mixture: its share of a step's loss, and the mean over its own terms."""

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from llava_ray.data.batches import MicroBatch
from llava_ray.model.network.transfer import to_device
from llava_ray.objectives.objective import ObjectiveOutput


class SourceLosses:
    """Sums of one step's losses by source, over its micro-batches and then over ranks; of no source without a mixture.

    In float64: the shares are read beside a loss to which they add up.
    """

    def __init__(self, names: Sequence[str], device: torch.device) -> None:
        """Start from zero."""
        self.names = names
        self.sums = torch.zeros(3, len(names), dtype=torch.float64, device=device)
        """Shares of the step's loss, sums of losses, numbers of terms."""

    def add(self, output: ObjectiveOutput, divisors: Float[Tensor, " n"] | float, batch: MicroBatch) -> None:
        """Add a micro-batch: a term's source is that of the sample in which it stands, ``divisors`` are of its kind."""
        if not self.names:
            return
        losses = output.losses.detach().double()
        sources = torch.from_numpy(np.repeat(np.asarray(batch.sources, np.int64), batch.num_tokens))
        # A row may end with filler, and a rank without samples has one token: no term stands there.
        owner = to_device(sources, losses.device)[output.positions]
        self.sums.index_add_(1, owner, torch.stack([losses / divisors, losses, torch.ones_like(losses)]))

    def reduce(self) -> None:
        """Sum over all ranks; collective, and no GPU is waited for."""
        if self.names:  # on every rank or on none
            dist.all_reduce(self.sums)

    @property
    def values(self) -> Float[Tensor, " v"]:
        """Return all sums in a row, for ``name_values``."""
        return self.sums.flatten()

    def name_values(self, loss: float, values: Sequence[float]) -> dict[str, float]:
        """Return ``loss/NAME``, the mean of a source's terms (NaN without any), and ``loss_share/NAME``.

        The shares are scaled to add up to ``loss``, which was summed in lower precision.
        """
        return dict(self._named(loss, values)) if self.names else {}

    def _named(self, loss: float, values: Sequence[float]) -> Iterator[tuple[str, float]]:
        count = len(self.names)
        shares, sums, terms = (values[first : first + count] for first in range(0, 3 * count, count))
        whole = math.fsum(shares)
        scale = loss / whole if whole and math.isfinite(loss) and math.isfinite(whole) else 1.0
        for name, share, total, number in zip(self.names, shares, sums, terms, strict=True):
            yield f"loss/{name}", total / number if number else math.nan
            yield f"loss_share/{name}", share * scale
