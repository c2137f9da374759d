"""The language model's head and the cross-entropy of its logits together, a chunk of tokens at a time.

The logits of all tokens never exist: 16,000 tokens of a vocabulary of 152,000 would take 10 GB in fp32. A chunk's
gradients are computed as soon as its losses, so that nothing is computed twice.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel

CHUNK = 256  # tokens whose logits exist at one time

# Types whose logits are those of the head, or of the head and a soft cap: others scale them in ways of their own.
_PLAIN_HEADS = frozenset({"gemma", "gemma2", "llama", "mistral", "phi3", "qwen2", "qwen3", "smollm3"})


def find_plain_head(language_model: PreTrainedModel) -> nn.Linear | None:
    """Return the head if its losses can be computed in chunks; None where the model must compute its own logits."""
    head = language_model.get_output_embeddings()
    if language_model.config.model_type not in _PLAIN_HEADS or type(head) is not nn.Linear:
        return None
    # ZeRO 3 gathers a partitioned weight around calls of its module, as often on each rank; chunks differ in number.
    return None if hasattr(head.weight, "ds_id") else head


def compute_head_losses(
    head: nn.Linear, hidden: Float[Tensor, "1 s d"], targets: Int[Tensor, " s"], softcap: float | None = None
) -> Float[Tensor, " s"]:
    """Return the fp32 cross-entropy of each token, from the hidden state that predicts it.

    The head is called as a module, so that its hooks see it.
    """

    def forward(states: Tensor) -> Tensor:
        if not torch.is_grad_enabled():  # autograd's functions are not told
            return _sweep(states[0], head.weight, head.bias, targets, softcap, (False, False, False))[1]
        losses: Tensor = _HeadLoss.apply(states[0], head.weight, head.bias, targets, softcap)
        return losses

    # An attribute of the instance hides the class's method during this one call.
    instance: Any = head
    instance.forward = forward
    try:
        found: Tensor = head(hidden)
    finally:
        del instance.forward
    return found


class _HeadLoss(torch.autograd.Function):
    """Losses of chunks; the gradients of hidden states and weights wait for the factor of each token's loss."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, softcap: float | None
    ) -> Tensor:
        """Compute losses, and the gradients of their sum."""
        ctx.softcap = softcap
        ctx.save_for_backward(hidden, weight, bias, targets)
        ctx.gradients, losses = _sweep(hidden, weight, bias, targets, softcap, ctx.needs_input_grad)
        return losses

    @staticmethod
    def backward(ctx: Any, factors: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients."""
        hidden, weight, bias, targets = ctx.saved_tensors
        of_hidden, of_weight, of_bias = ctx.gradients
        ctx.gradients = None
        if of_hidden is not None:
            of_hidden = of_hidden.mul_(factors.unsqueeze(1))
        if of_weight is not None or of_bias is not None:
            if len(factors) and factors.stride() == (0,):  # of a sum: one factor for all, without a look at its values
                of_weight, of_bias = (None if own is None else own.mul_(factors[0]) for own in (of_weight, of_bias))
            else:
                wanted = (False, of_weight is not None, of_bias is not None)
                (_, of_weight, of_bias), _ = _sweep(hidden, weight, bias, targets, ctx.softcap, wanted, factors)
        return of_hidden, _cast(of_weight, weight), _cast(of_bias, weight), None, None


def _sweep(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    softcap: float | None,
    wanted: tuple[bool, ...],
    factors: Tensor | None = None,
) -> tuple[tuple[Tensor | None, Tensor | None, Tensor | None], Tensor]:
    """Return the gradients of hidden states, weight and bias that are wanted, and the losses, chunk by chunk.

    Gradients of the weight are summed in fp32, as one multiplication would sum them.
    """
    of_hidden = torch.empty_like(hidden) if wanted[0] else None
    of_weight = torch.zeros_like(weight, dtype=torch.float32) if wanted[1] else None
    of_bias = torch.zeros_like(weight[:, 0], dtype=torch.float32) if wanted[2] and bias is not None else None
    losses = []
    for start in range(0, len(hidden), CHUNK):
        place = slice(start, start + CHUNK)
        states, wanted_tokens = hidden[place], targets[place, None]
        log_shares, bends = _log_shares(linear(states, weight, bias).float(), softcap)
        losses.append(-log_shares.gather(1, wanted_tokens).squeeze(1))
        if not any(wanted):
            continue
        slopes = log_shares.exp_()
        slopes.scatter_add_(1, wanted_tokens, slopes.new_full(wanted_tokens.shape, -1.0))
        for factor in (bends, None if factors is None else factors[place, None]):
            if factor is not None:
                slopes.mul_(factor)
        own = slopes.to(weight.dtype)
        if of_hidden is not None:
            torch.mm(own, weight, out=of_hidden[place])
        if of_weight is not None:
            _add_product(of_weight, own.t(), states)
        if of_bias is not None:
            of_bias += slopes.sum(0)
    return (of_hidden, of_weight, of_bias), torch.cat(losses) if losses else hidden.new_zeros(0, dtype=torch.float32)


def _log_shares(scores: Tensor, softcap: float | None) -> tuple[Tensor, Tensor | None]:
    """Return the log-softmax of a head's output, capped if it is to be, and the derivative of that cap."""
    if softcap is None:
        return scores.log_softmax(-1), None
    capped = scores.div_(softcap).tanh_()
    return (capped * softcap).log_softmax(-1), 1 - capped.square()


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add a product of matrices to a total in fp32."""
    if left.dtype == torch.float32:
        total.addmm_(left, right)
    else:
        total += left @ right


def _cast(gradient: Tensor | None, like: Tensor) -> Tensor | None:
    """Return a gradient in a weight's dtype."""
    return None if gradient is None else gradient.to(like.dtype)
