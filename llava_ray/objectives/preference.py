"""Objectives over pairs of answers: the loss of a preference from the log-probabilities of its two answers.

Notation: a chosen answer w and a rejected one l to the same prompt x, log-probabilities summed over an answer's
supervised tokens, |w| and |l| their numbers; π the policy, ref the model that it starts from;
Δ = log π(w)/ref(w) − log π(l)/ref(l).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

from llava_ray.config.preference import WITH_REFERENCE, PreferenceConfig
from llava_ray.errors import ModelError
from llava_ray.objectives.cross_entropy import compute_row_losses
from llava_ray.objectives.objective import LogitsModel, ObjectiveOutput, PackedRow, StepTotals
from llava_ray.objectives.row_pairs import RowPairs

_METRICS = (
    "reward_chosen",
    "reward_rejected",
    "reward_margin",
    "reward_accuracy",
    "logp_chosen",
    "logp_rejected",
)
_CHOSEN, _REJECTED = 0, 1
_PAIR, _TOKEN, _CHOSEN_TOKEN = 0, 1, 2  # kinds of terms


@dataclass(frozen=True)
class PairScores:
    """What the losses of n preferences are made of; columns are the chosen and the rejected answer.

    Log-probabilities are natural, and sums over an answer's tokens.
    """

    log_probs: Float[Tensor, "n 2"]
    num_tokens: Float[Tensor, "n 2"]
    reference: Float[Tensor, "n 2"]
    """Zeros where the objective has no reference."""

    @property
    def log_ratios(self) -> Float[Tensor, "n 2"]:
        """Return log π − log ref of each answer."""
        return self.log_probs - self.reference

    @property
    def margin(self) -> Float[Tensor, " n"]:
        """Return Δ."""
        return self.log_ratios[:, _CHOSEN] - self.log_ratios[:, _REJECTED]

    @property
    def mean_margin(self) -> Float[Tensor, " n"]:
        """Return Δ of the averages over each answer's tokens."""
        means = self.log_ratios / self.num_tokens
        return means[:, _CHOSEN] - means[:, _REJECTED]


def dpo_losses(scores: PairScores, settings: PreferenceConfig) -> Float[Tensor, " n"]:
    """Return −(1−ε) log σ(β Δ) − ε log σ(−β Δ), ε = label_smoothing.

    Direct Preference Optimization, Rafailov et al. 2023, arXiv:2305.18290, eq. 7; with ε it is conservative DPO
    (Mitchell 2023).
    """
    return _smoothed(settings.beta * scores.margin, settings.label_smoothing)


def dpo_norm_losses(scores: PairScores, settings: PreferenceConfig) -> Float[Tensor, " n"]:
    """Return DPO's losses with log-probabilities averaged over each answer's tokens.

    Length-normalised DPO: Lambert et al. 2024 (Tülu 3), arXiv:2411.15124, eq. 6.
    """
    return _smoothed(settings.beta * scores.mean_margin, settings.label_smoothing)


def ipo_losses(scores: PairScores, settings: PreferenceConfig) -> Float[Tensor, " n"]:
    """Return (Δ̄ − 1/(2β))², Δ̄ the margin of averages over tokens.

    Identity Preference Optimisation, Azar et al. 2023, arXiv:2310.12036, eq. 17, normalised by length as its authors
    do in their results.
    """
    return (scores.mean_margin - 1 / (2 * settings.beta)) ** 2


def hinge_losses(scores: PairScores, settings: PreferenceConfig) -> Float[Tensor, " n"]:
    """Return max(0, 1 − β Δ).

    SLiC-HF's hinge on DPO's margin: Zhao et al. 2023, arXiv:2305.10425; Liu et al. 2023 (RSO), arXiv:2309.06657.
    """
    return torch.relu(1 - settings.beta * scores.margin)


def robust_losses(scores: PairScores, settings: PreferenceConfig) -> Float[Tensor, " n"]:
    """Return (−(1−ε) log σ(β Δ) + ε log σ(−β Δ)) / (1 − 2ε): unbiased where a share ε of the pairs is flipped.

    Provably Robust DPO, Chowdhury et al. 2024, arXiv:2403.00409, eq. 13.
    """
    logits, share = settings.beta * scores.margin, settings.label_smoothing
    return (-(1 - share) * logsigmoid(logits) + share * logsigmoid(-logits)) / (1 - 2 * share)


def simpo_losses(scores: PairScores, settings: PreferenceConfig) -> Float[Tensor, " n"]:
    """Return −log σ(β log π(w)/|w| − β log π(l)/|l| − γ), without a reference; smoothed as DPO's.

    SimPO, Meng et al. 2024, arXiv:2405.14734, eq. 6.
    """
    return _smoothed(settings.beta * scores.mean_margin - settings.simpo_gamma, settings.label_smoothing)


def orpo_losses(scores: PairScores, settings: PreferenceConfig) -> Float[Tensor, " n"]:
    """Return −β log σ(log odds(w) − log odds(l)), odds = p/(1−p) of the mean probability of a token.

    ORPO, Hong et al. 2024, arXiv:2403.07691, eq. 6 and 7 with λ = β; the cross-entropy of the chosen answers is added
    to it by ``PairObjective``.
    """
    means = scores.log_probs / scores.num_tokens
    # log(1 − p) of p near 1: expm1 keeps digits that 1 − exp would lose.
    log_odds = means - torch.log(-torch.expm1(means.clamp(max=-1e-7)))
    return -settings.beta * logsigmoid(log_odds[:, _CHOSEN] - log_odds[:, _REJECTED])


def _smoothed(logits: Float[Tensor, " n"], share: float) -> Float[Tensor, " n"]:
    """Return −(1−share) log σ(logits) − share log σ(−logits)."""
    return softplus(-logits) + share * logits if share else -logsigmoid(logits)


PairLoss = Callable[[PairScores, PreferenceConfig], Float[Tensor, " n"]]
PAIR_LOSSES: dict[str, PairLoss] = {
    "dpo": dpo_losses,
    "dpo_norm": dpo_norm_losses,
    "ipo": ipo_losses,
    "hinge": hinge_losses,
    "robust": robust_losses,
    "simpo": simpo_losses,
    "orpo": orpo_losses,
}
_OF_MEANS = {"dpo_norm", "ipo", "simpo", "orpo"}  # whose rewards are averages over tokens


class PairObjective:
    """A loss of pairs, beside the cross-entropy of conversations in the same step and of chosen answers.

    A step's loss = mean over its pairs + mean over the supervised tokens of its conversations + weight × mean over the
    supervised tokens of its chosen answers (RPO's term, Pang et al. 2024, arXiv:2404.19733; weight 1 in ORPO).
    """

    num_kinds = 3

    def __init__(self, name: str, settings: PreferenceConfig) -> None:
        """Choose the loss by name, a key of ``PAIR_LOSSES``."""
        self.name, self.settings, self.losses_of = name, settings, PAIR_LOSSES[name]
        self.needs_reference = name in WITH_REFERENCE
        self.chosen_weight = 1.0 if name == "orpo" else settings.rpo_alpha
        self.metric_names: Sequence[str] = (*_METRICS, "kl") if self.needs_reference else _METRICS

    def compute(self, model: LogitsModel, row: PackedRow) -> ObjectiveOutput:
        """Return the losses of a row's pairs, its conversations' tokens and, weighed, its chosen answers' tokens.

        Raises ModelError for pairs without the reference's log-probabilities.
        """
        predicting, token_losses = compute_row_losses(model, row)
        pairs = row.pairs
        if pairs is None:
            kinds = torch.full_like(predicting, _TOKEN)
            return ObjectiveOutput(token_losses, predicting, self._metrics(None), kinds)
        scores = self.score(token_losses, pairs)
        losses, positions = [self.losses_of(scores, self.settings)], [pairs.positions]
        found_kinds = [torch.full_like(pairs.positions, _PAIR)]
        terms = [(pairs.owners < 0, 1.0, _TOKEN)]
        if self.chosen_weight:
            terms.append(((pairs.owners >= 0) & (pairs.owners % 2 == _CHOSEN), self.chosen_weight, _CHOSEN_TOKEN))
        for which, weight, kind in terms:
            losses.append(weight * token_losses[which])
            positions.append(predicting[which])
            found_kinds.append(torch.full_like(positions[-1], kind))
        return ObjectiveOutput(torch.cat(losses), torch.cat(positions), self._metrics(scores), torch.cat(found_kinds))

    def score(self, token_losses: Float[Tensor, " s"], pairs: RowPairs) -> PairScores:
        """Sum the log-probabilities of a row's supervised tokens by answer. Raises ModelError without a reference."""
        log_probs = sum_by_answer(token_losses, pairs)
        if not self.needs_reference:
            return PairScores(log_probs, pairs.num_tokens, torch.zeros_like(log_probs))
        if pairs.reference is None:
            raise ModelError(f"{self.name} needs the reference's log-probabilities of each pair, and there are none")
        return PairScores(log_probs, pairs.num_tokens, pairs.reference)

    def num_step_terms(self, totals: StepTotals) -> Sequence[int]:
        """Return the step's number of pairs, of conversations' tokens and of chosen answers' tokens."""
        return totals.num_pairs, totals.num_supervised, totals.num_chosen

    @torch.no_grad()
    def _metrics(self, scores: PairScores | None) -> dict[str, Float[Tensor, ""]]:
        """Return sums over a row's pairs: rewards (β log π/ref), their margin and order, log-probabilities, and "kl".

        "kl" is the mean of log π − log ref over the tokens of both answers, an estimate of the divergence from the
        reference on the data's own answers.
        """
        if scores is None:
            return {name: torch.zeros(()) for name in self.metric_names}
        ratios = scores.log_ratios / scores.num_tokens if self.name in _OF_MEANS else scores.log_ratios
        rewards = self.settings.beta * ratios
        margin = rewards[:, _CHOSEN] - rewards[:, _REJECTED]
        found = [rewards[:, _CHOSEN], rewards[:, _REJECTED], margin, (margin > 0).float(), *scores.log_probs.unbind(1)]
        if self.needs_reference:
            found.append(scores.log_ratios.sum(1) / scores.num_tokens.sum(1))
        return {name: values.sum() for name, values in zip(self.metric_names, found, strict=True)}


def sum_by_answer(token_losses: Float[Tensor, " s"], pairs: RowPairs) -> Float[Tensor, "m 2"]:
    """Return the natural log-probability of each answer of a row's preferences."""
    is_answer = pairs.owners >= 0
    sums = token_losses.new_zeros(pairs.num_tokens.numel())
    return sums.index_add(0, pairs.owners[is_answer], -token_losses[is_answer]).view(-1, 2)
