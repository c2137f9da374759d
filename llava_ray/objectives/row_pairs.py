"""The preferences of a packed row: which of its tokens are of which answer."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from llava_ray.model.network.transfer import to_device


@dataclass(frozen=True)
class RowPairs:
    """The m preferences of a packed row, each a sample that branches after its prompt."""

    owners: Int[Tensor, " s"]
    """Of each supervised token: 2 i where it is of the chosen answer of preference i, 2 i + 1 of the rejected, -1 of a
    conversation."""
    num_tokens: Float[Tensor, "m 2"]
    """Supervised tokens of each answer."""
    positions: Int[Tensor, " m"]
    """Each preference's first token in the row."""
    reference: Float[Tensor, "m 2"] | None = None
    """Natural log-probabilities of the answers by the reference."""

    @classmethod
    def of(
        cls,
        predicting: Int[Tensor, " s"],
        lengths: Sequence[int],
        branches: Sequence[tuple[int, int] | None],
        reference: Float[Tensor, "m 2"] | None,
        device: torch.device,
    ) -> "RowPairs":
        """Count on the CPU, and move to the device; ``branches`` as SampleBorders has them."""
        bounds: list[int] = []
        owner_of: list[int] = []
        firsts: list[int] = []
        start = 0
        for length, branch in zip(lengths, branches, strict=True):
            number = 2 * len(firsts)
            if branch is None:
                bounds.append(start + length)
                owner_of.append(-1)
            else:
                bounds += [start + branch[1], start + length]
                owner_of += [number, number + 1]
                firsts.append(start)
            start += length
        owners = torch.tensor(owner_of)[torch.searchsorted(torch.tensor(bounds), predicting, right=True)]
        counts = torch.bincount(owners[owners >= 0], minlength=2 * len(firsts)).view(-1, 2)
        return cls(
            to_device(owners, device),
            to_device(counts.float(), device),
            to_device(torch.tensor(firsts), device),
            None if reference is None else to_device(reference.float(), device),
        )
