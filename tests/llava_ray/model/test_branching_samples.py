"""Two answers that share a prompt and its images in one row, against each conversation by itself."""

from dataclasses import replace
from typing import Any

import fakes
import pytest
import torch

from llava_ray.chat.conversation import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava_ray.data.pair_lengths import PairLengths
from llava_ray.objectives.cross_entropy import compute_row_losses
from llava_ray.objectives.objective import PackedRow
from llava_ray.objectives.preference import sum_by_answer

CPU = torch.device("cpu")
NUM_PATCHES = 16


def alone(llava: Any, ids: list[int], labels: list[int], features: torch.Tensor | None) -> torch.Tensor:
    """The log-probability of one conversation's answer, from logits of the conversation by itself."""
    tokens, targets = torch.tensor([ids]), torch.tensor(labels)
    predicting = torch.arange(len(ids) - 1)[targets[1:] != IGNORE_INDEX]
    with llava.own_attention():
        logits = llava(tokens, torch.arange(len(ids))[None], predicting, features=features)
    return logits.float().log_softmax(-1).gather(1, targets[predicting + 1][:, None]).sum()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "qwen2", "mistral", "gemma2"])  # windows, and scores with a soft cap
def test_a_packed_pair_has_the_log_probabilities_and_gradients_of_its_two_sides(kind: str, folders) -> None:
    parts = folders.assemble(kind)
    llava = parts.llava
    llava.attend_by_sample()
    pixels = torch.randn(3, 3, fakes.IMAGE_SIZE, fakes.IMAGE_SIZE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        features = parts.tower(pixels)
    image = [IMAGE_TOKEN_INDEX] * NUM_PATCHES
    # Prompt, chosen, rejected, and its images: one image, none, two.
    pairs = [
        ([1, *image, 20, 21], [40, 41, 42, 2], [43, 2], features[:1]),
        ([1, 22, 23, 24], [44, 2], [45, 46, 47, 48, 49, 2], None),
        ([1, *image, 25, *image, 26, 27, 28], [50, 51, 2], [52, 53, 2], features[1:]),
    ]
    ids: list[int] = []
    labels: list[int] = []
    positions: list[int] = []
    branches = []
    for prompt, chosen, rejected, _ in pairs:
        lengths = PairLengths(len(prompt) - 1, len(chosen) + 1, len(rejected) + 1)
        ids += prompt + chosen + prompt[-1:] + rejected
        labels += [IGNORE_INDEX] * len(prompt) + chosen + [IGNORE_INDEX] + rejected
        positions += lengths.position_ids.tolist()
        branches.append((lengths.shared, lengths.shared + lengths.chosen))
    tensors = [torch.tensor(values)[None] for values in (ids, positions, labels)]
    row = replace(PackedRow.on_device(*tensors, CPU, branches=branches, multiple=64), features=features)
    _, losses = compute_row_losses(llava, row)
    assert row.pairs is not None
    packed = sum_by_answer(losses, row.pairs)
    expected = torch.stack(
        [
            torch.stack([alone(llava, prompt + side, [IGNORE_INDEX] * len(prompt) + side, some) for side in sides])
            for prompt, *sides, some in pairs
        ]
    )
    torch.testing.assert_close(packed, expected, rtol=1e-5, atol=1e-5)
    gradients = []
    weights = torch.tensor([[1.0, -0.5], [0.3, 0.7], [-1.0, 2.0]])
    for found in (packed, expected):
        llava.zero_grad()
        (found * weights).sum().backward()
        gradients.append({name: p.grad.clone() for name, p in llava.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[1].items():
        assert (gradients[0][name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-6, name
