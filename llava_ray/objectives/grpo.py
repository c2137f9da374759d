"""Group-relative policy optimisation: answers with more reward than others to the same question become likelier.

GRPO (Shao et al., 2024, DeepSeekMath, https://arxiv.org/abs/2402.03300, equations 3 and 4). For token t of answer i
with the probability ratio r = exp(log p(o_it) - log p_old(o_it)) and the advantage A_i of its answer::

    l_it = -min(r A_i, clip(r, 1 - epsilon, 1 + epsilon_high) A_i) + beta (exp(q) - q - 1)
    q    = log p_ref(o_it) - log p(o_it)

p is the model at the temperature of the sampling, p_old the model that sampled the answer, p_ref the one that the run
started with. Upper and lower bound may differ as in DAPO (Yu et al., 2025, https://arxiv.org/abs/2503.14476). A step's
loss is the sum of ``weight`` x l_it, divided by the number of its tokens: the weights make it one of the published
means (see ``train.rollouts.advantages``).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llava_ray.objectives.cross_entropy import compute_token_losses
from llava_ray.objectives.objective import LogitsModel, ObjectiveOutput, PackedRow, StepTotals


@dataclass(frozen=True)
class Grpo:
    """The clipped policy gradient of sampled answers, whose rows carry ``rollouts``."""

    epsilon: float = 0.2
    epsilon_high: float = 0.2
    beta: float = 0.0
    temperature: float = 1.0

    @property
    def num_kinds(self) -> int:
        """Return 1: all terms are tokens."""
        return 1

    @property
    def metric_names(self) -> Sequence[str]:
        """Return the metrics, means over tokens.

        ``entropy`` is the mean of -log p_old of what was sampled; ``policy_gap`` that of the
        distance from log p_old to log p.
        """
        return ("ratio", "clipped_low_share", "clipped_high_share", "policy_gap", "entropy", *["kl"][: self.beta > 0])

    def compute(self, model: LogitsModel, row: PackedRow) -> ObjectiveOutput:
        """Return the weighted loss of each token that was sampled, in order. Raises ModelError as ``Llava`` does."""
        terms = row.rollouts
        assert terms is not None  # rows of other data never get here: see ``build_objective``
        predicting, targets = row.find_supervised()
        # Without a temperature, a plain head computes the cross-entropy without holding all logits.
        known = {"targets": targets} if self.temperature == 1 else {}
        found = model(row.input_ids, row.position_ids, predicting, **row.model_inputs, **known)
        new = -(found if found.ndim == 1 else compute_token_losses(found, targets, self.temperature))
        ratio = (new - terms.old_log_probs).exp()
        low, high, advantages = 1 - self.epsilon, 1 + self.epsilon_high, terms.advantages
        losses = -torch.minimum(ratio * advantages, ratio.clamp(low, high) * advantages)
        sums = {
            "ratio": ratio,
            "clipped_low_share": (ratio < low) & (advantages < 0),
            "clipped_high_share": (ratio > high) & (advantages > 0),
            "policy_gap": (new - terms.old_log_probs).abs(),
            "entropy": -terms.old_log_probs,
        }
        if self.beta > 0:
            assert terms.reference_log_probs is not None
            sums["kl"] = compute_token_kl(new, terms.reference_log_probs)
            losses = losses + self.beta * sums["kl"]
        metrics = {name: values.detach().to(losses.dtype).sum() for name, values in sums.items()}
        return ObjectiveOutput(losses * terms.weights, predicting, metrics)

    def num_step_terms(self, totals: StepTotals) -> Sequence[int]:
        """Return the number of sampled tokens of the whole step."""
        return (totals.num_supervised,)


def compute_token_kl(log_probs: Tensor, reference_log_probs: Tensor) -> Tensor:
    """Compute the estimate of the KL divergence from the reference at each token, which is never negative."""
    gap = reference_log_probs - log_probs
    return gap.exp() - gap - 1
