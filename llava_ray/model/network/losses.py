"""Losses of a packed row, sample by sample."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from llava_ray.images.anyres import Size
from llava_ray.model.network.llava import Llava, find_supervised


def sample_losses(
    llava: Llava,
    input_ids: Int[Tensor, "1 t"],
    position_ids: Int[Tensor, "1 t"],
    labels: Int[Tensor, "1 t"],
    features: Float[Tensor, "n p v"] | None = None,
    image_sizes: Sequence[Size] = (),
) -> tuple[Float[Tensor, " m"], Int[Tensor, " m"]]:
    """Return each packed sample's mean loss over its supervised tokens, and their number.

    A sample without supervised tokens has loss NaN and number 0. Raises ModelError as ``Llava.forward`` does.
    """
    losses = llava(input_ids, position_ids, labels, features, image_sizes)
    sample_of_position = (position_ids[0] == 0).cumsum(0) - 1
    predicting, _ = find_supervised(labels, position_ids)
    owner = sample_of_position[predicting]
    num_samples = int(sample_of_position[-1]) + 1
    counts = torch.bincount(owner, minlength=num_samples)
    sums = losses.new_zeros(num_samples).index_add(0, owner, losses)
    return sums / counts, counts
