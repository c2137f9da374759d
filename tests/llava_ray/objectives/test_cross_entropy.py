"""Cross-entropy against the formula that it replaced, bit for bit, and its chunks."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from llava_ray.chat.conversation import IGNORE_INDEX
from llava_ray.objectives.cross_entropy import LOGITS_CHUNK, CrossEntropy, compute_token_losses
from llava_ray.objectives.objective import PackedRow
from llava_ray.train.planning import memory

VOCABULARY = 23


class Bigrams(torch.nn.Module):
    """Logits that depend on the token alone; a language model as far as an objective can tell."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.table = torch.nn.Parameter(torch.randn(VOCABULARY, VOCABULARY, generator=generator).to(dtype))

    def forward(self, input_ids, position_ids, predicting, **images):
        return self.table[input_ids[0, predicting]]


def make_row(num_tokens: int, seed: int) -> PackedRow:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(VOCABULARY, (1, num_tokens), generator=generator)
    labels = ids.masked_fill(torch.rand(1, num_tokens, generator=generator) < 0.3, IGNORE_INDEX)
    first = num_tokens // 3
    positions = torch.cat([torch.arange(first), torch.arange(num_tokens - first)])[None]
    return PackedRow(ids, positions, labels)


def reference_losses(model: Bigrams, row: PackedRow) -> torch.Tensor:
    """What ``Llava.forward`` returned when it computed the loss itself: logits in fp32, no reduction."""
    following = row.labels[0, 1:].masked_fill(row.position_ids[0, 1:] == 0, IGNORE_INDEX)
    predicting = (following != IGNORE_INDEX).nonzero().squeeze(1)
    logits = model.table[row.input_ids[0, predicting]]
    return cross_entropy(logits.float(), following[predicting], reduction="none")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_tokens", [3, 60, 3 * LOGITS_CHUNK])
def test_losses_and_gradients_are_bit_equal_to_the_plain_formula(dtype: torch.dtype, num_tokens: int) -> None:
    model, plain, row = Bigrams(dtype), Bigrams(dtype), make_row(num_tokens, seed=2)
    objective = CrossEntropy()
    output, expected = objective.compute(model, row), reference_losses(plain, row)
    assert torch.equal(output.losses, expected)
    assert output.num_terms == len(expected)
    (output.loss_sum / 7).backward()
    (expected.sum() / 7).backward()
    assert torch.equal(model.table.grad, plain.table.grad)


def test_a_row_without_supervised_tokens_has_a_gradient_of_zero() -> None:
    model = Bigrams(torch.float32)
    row = PackedRow(torch.tensor([[0]]), torch.tensor([[0]]), torch.tensor([[IGNORE_INDEX]]))
    output = CrossEntropy().compute(model, row)
    assert (output.loss_sum.item(), output.num_terms) == (0.0, 0)
    output.loss_sum.backward()
    assert not model.table.grad.any()


def test_chunked_losses_and_their_gradients() -> None:
    logits = torch.randn(LOGITS_CHUNK + 5, 11).bfloat16().requires_grad_()
    targets = torch.arange(len(logits)) % 11
    losses = compute_token_losses(logits, targets)
    losses.sum().backward()
    whole = logits.detach().float().requires_grad_()
    expected = cross_entropy(whole, targets, reduction="none")
    expected.sum().backward()
    assert torch.equal(losses, expected)
    assert torch.equal(logits.grad, whole.grad.bfloat16())


def test_the_estimate_of_memory_counts_the_same_chunk() -> None:
    assert memory._LOGITS_CHUNK == LOGITS_CHUNK
