"""Cross-entropy of the supervised tokens: LLaVA's instruction tuning, every token of a step weighing the same."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from llava_ray.objectives.objective import LogitsModel, ObjectiveOutput, PackedRow, StepTotals

LOGITS_CHUNK = 512  # supervised tokens whose logits are in fp32 at one time


class CrossEntropy:
    """The mean negative log-likelihood of the supervised tokens."""

    num_kinds = 1
    metric_names: Sequence[str] = ()

    def compute(self, model: LogitsModel, row: PackedRow) -> ObjectiveOutput:
        """Return the fp32 cross-entropy of each supervised token, in order. Raises ModelError as ``Llava`` does."""
        predicting, losses = compute_row_losses(model, row)
        return ObjectiveOutput(losses, predicting)

    def num_step_terms(self, totals: StepTotals) -> Sequence[int]:
        """Return the number of supervised tokens of the whole step."""
        return (totals.num_supervised,)


def compute_row_losses(model: LogitsModel, row: PackedRow) -> tuple[Int[Tensor, " s"], Float[Tensor, " s"]]:
    """Return the position that predicts each supervised token of a row, and the token's cross-entropy in fp32."""
    predicting, targets = row.find_supervised()
    found = model(row.input_ids, row.position_ids, predicting, **row.model_inputs, targets=targets)
    return predicting, found if found.ndim == 1 else compute_token_losses(found, targets)


def compute_token_losses(
    logits: Float[Tensor, "s vocab"], targets: Int[Tensor, " s"], temperature: float = 1.0
) -> Float[Tensor, " s"]:
    """Return the cross-entropy of each token in fp32, of the logits divided by a ``temperature``.

    Half-precision logits are widened a chunk at a time and again in the backward pass: 2,048 tokens of a vocabulary of
    152,000 would otherwise hold 1.2 GB of fp32 copies.
    """
    if logits.dtype == torch.float32 or not logits.shape[0]:
        return _fp32_losses(logits, targets, temperature)
    chunks = zip(torch.split(logits, LOGITS_CHUNK), torch.split(targets, LOGITS_CHUNK), strict=True)
    return torch.cat(
        [
            checkpoint(_fp32_losses, *chunk, temperature, use_reentrant=False, preserve_rng_state=False)
            for chunk in chunks
        ]
    )


def _fp32_losses(
    logits: Float[Tensor, "s vocab"], targets: Int[Tensor, " s"], temperature: float
) -> Float[Tensor, " s"]:
    """Return the cross-entropy of each token, computed in fp32."""
    scaled = logits.float() if temperature == 1 else logits.float() / temperature
    return cross_entropy(scaled, targets, reduction="none")
