"""Which tokens are predicted, and losses sample by sample."""

import torch

from llava_ray.chat.conversation import IGNORE_INDEX
from llava_ray.objectives.objective import ObjectiveOutput, find_supervised, mean_by_sample


def test_a_first_token_is_never_a_target() -> None:
    """The token before a sample's first belongs to another sample of the row."""
    labels = torch.tensor([[IGNORE_INDEX, 5, 6, 7]])
    positions = torch.tensor([[0, 1, 0, 1]])
    predicting, targets = find_supervised(labels, positions)
    assert predicting.tolist() == [0, 2]
    assert targets.tolist() == [5, 7]


def test_losses_are_averaged_over_the_terms_of_each_sample() -> None:
    positions = torch.tensor([[0, 1, 2, 0, 1, 0]])
    output = ObjectiveOutput(torch.tensor([1.0, 4.0, 5.0]), torch.tensor([0, 1, 3]))
    means, counts = mean_by_sample(output, positions)
    assert means[:2].tolist() == [2.5, 5.0]
    assert means[2].isnan()
    assert counts.tolist() == [2, 1, 0]
