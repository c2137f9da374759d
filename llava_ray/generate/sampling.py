"""Sampling of the next token of each row, each with its own settings."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from llava_ray.errors import ModelError, RecordError
from llava_ray.generate.engine import Sampling

_FEW = 256  # most likely tokens among which the threshold of top_p is searched before all are sorted
MAX_BIASES = 1024  # tokens of a logit_bias
MAX_BIAS, MAX_PENALTY = 100.0, 2.0  # as in OpenAI's API
COLDEST = 1e-5  # temperatures below it, as in vLLM, are 0: logits divided by less leave fp32


def check_sampling(sampling: Sampling) -> None:
    """Check the sampling settings. Raises RecordError."""
    problems = {
        "max_tokens": (sampling.max_tokens, sampling.max_tokens >= 1, "1 or more"),
        "temperature": (sampling.temperature, 0 <= sampling.temperature < math.inf, "0 (greedy) or more"),
        "top_p": (sampling.top_p, 0 < sampling.top_p <= 1, "more than 0, at most 1"),
        "top_k": (sampling.top_k, sampling.top_k >= 0, "0 (all) or more"),
        "logprobs": (sampling.logprobs, (sampling.logprobs or 0) >= 0, "0 or more"),
        "stop": (sampling.stop, all(sampling.stop), "texts that are not empty"),
        "min_p": (sampling.min_p, 0 <= sampling.min_p <= 1, "0 to 1"),
        "presence_penalty": (sampling.presence_penalty, abs(sampling.presence_penalty) <= MAX_PENALTY, "-2 to 2"),
        "frequency_penalty": (sampling.frequency_penalty, abs(sampling.frequency_penalty) <= MAX_PENALTY, "-2 to 2"),
        "repetition_penalty": (
            sampling.repetition_penalty,
            0 < sampling.repetition_penalty < math.inf,
            "more than 0 (1 changes nothing)",
        ),
        "prompt_logprobs": (sampling.prompt_logprobs, (sampling.prompt_logprobs or 0) >= 0, "0 or more"),
        "logit_bias": (
            f"of {len(sampling.logit_bias)} tokens",
            len(sampling.logit_bias) <= MAX_BIASES and all(abs(bias) <= MAX_BIAS for _, bias in sampling.logit_bias),
            f"at most {MAX_BIASES} tokens, each with a number from -100 to 100",
        ),
    }
    for name, (value, good, expected) in problems.items():
        if not good:
            raise RecordError(f"{name} is {value}; expected {expected}.", reason="sampling", field=name)


def find_finite_rows(logits: Float[Tensor, "n vocab"]) -> list[bool]:
    """Return for each row whether all its logits are finite, before anything is masked with -inf."""
    finite: list[bool] = logits.sum(-1).isfinite().tolist()  # ten times faster than checking each
    return finite if all(finite) else logits.isfinite().all(-1).tolist()  # the sum of huge ones may overflow


def not_finite_error(where: str) -> ModelError:
    """Return the error for logits that are not finite; ``where`` says which."""
    return ModelError(
        f"the model's logits are not finite ({where} holds NaN or infinity): its weights are damaged, or this "
        "precision is too narrow for it. Use a checkpoint that has not diverged, or a wider dtype."
    )


def sample_tokens(logits: Float[Tensor, "n vocab"], samplings: Sequence[Sampling], draws: Sequence[float]) -> list[int]:
    """Sample a token for each row, or take the most likely one at temperature 0.

    ``draws`` are numbers of [0, 1), one a row: a row's token depends on its logits and its number alone. The number is
    located in the cumulative probabilities in vocabulary order, which rounding hardly changes.
    """
    tokens: list[int] = logits.argmax(-1).tolist()
    drawn = [row for row, sampling in enumerate(samplings) if sampling.temperature >= COLDEST]
    if drawn:
        some = [samplings[row] for row in drawn]
        temperatures = logits.new_tensor([sampling.temperature for sampling in some])
        likely = _keep_likely(logits[drawn] / temperatures.unsqueeze(1), some)
        sums = likely.softmax(-1).double().cumsum(-1)
        numbers = sums.new_tensor([draws[row] for row in drawn]).unsqueeze(1) * sums[:, -1:]
        found = torch.searchsorted(sums, numbers, right=True).squeeze(1).clamp(max=logits.shape[1] - 1)
        for row, token in zip(drawn, found.tolist(), strict=True):
            tokens[row] = token
    return tokens


def _keep_likely(scores: Float[Tensor, "n vocab"], samplings: Sequence[Sampling]) -> Float[Tensor, "n vocab"]:
    """Set the scores outside min_p, then top_k, then top_p to -inf, in vLLM's order."""
    for row, sampling in enumerate(samplings):
        if sampling.min_p > 0:
            threshold = scores[row].max() + math.log(sampling.min_p)
            scores[row].masked_fill_(scores[row] < threshold, -torch.inf)
        if 0 < sampling.top_k < scores.shape[1]:
            threshold = scores[row].topk(sampling.top_k).values[-1]
            scores[row].masked_fill_(scores[row] < threshold, -torch.inf)
        if sampling.top_p < 1:
            scores[row].masked_fill_(scores[row] < find_threshold(scores[row], sampling.top_p), -torch.inf)
    return scores


def find_threshold(scores: Float[Tensor, " vocab"], top_p: float) -> Float[Tensor, ""]:
    """Return the least score among the most likely tokens whose probabilities add up to ``top_p``."""
    total = scores.logsumexp(0)
    for count in (min(_FEW, len(scores)), len(scores)):
        best = scores.topk(count).values
        sums = (best - total).exp().cumsum(0)
        needed = int((sums < top_p).sum())
        if needed < count:
            return best[needed]
    return scores.min()


def compute_logprobs(
    logits: Float[Tensor, "n vocab"], tokens: Sequence[int], num_best: int
) -> list[tuple[float, list[tuple[int, float]]]]:
    """Return each token's natural log-probability, and (id, log-probability) of its row's most likely, best first."""
    every = logits.log_softmax(-1)
    chosen = every.gather(1, torch.tensor(tokens, device=logits.device).unsqueeze(1)).squeeze(1).tolist()
    best = every.topk(min(num_best, every.shape[1]), dim=-1)
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return [(mine, list(zip(*others, strict=True))) for mine, others in zip(chosen, pairs, strict=True)]
