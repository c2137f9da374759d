"""Advantages of answers within their group, and the weights that make a step's loss one of the published means."""

import numpy as np
from jaxtyping import Float, Int

from llava_ray.config.grpo import GrpoConfig

_SMALLEST = 1e-4  # added to a standard deviation, as published implementations do


def compute_advantages(rewards: Float[np.ndarray, "n g"], scale: str) -> Float[np.ndarray, "n g"]:
    """Compute each answer's advantage: its reward less its group's mean, over the standard deviation or not.

    The deviation is that of a sample (n - 1). A group of equal rewards has advantages of exactly 0.
    """
    advantages: Float[np.ndarray, "n g"] = rewards - rewards.mean(1, keepdims=True)
    if scale == "group":
        advantages = advantages / (rewards.std(1, ddof=1, keepdims=True) + _SMALLEST)
    return np.where(find_spread(rewards)[:, None], advantages, 0.0)


def find_spread(rewards: Float[np.ndarray, "n g"]) -> Float[np.ndarray, " n"]:
    """Return which groups have different rewards: a sum of equal ones may be rounded."""
    return np.ptp(rewards, axis=1) > 0


def weigh_answers(num_tokens: Int[np.ndarray, " n"], grpo: GrpoConfig) -> Float[np.ndarray, " n"]:
    """Compute the weight of each answer's tokens in a loss that is divided by the number of all tokens.

    ``dapo``: 1. ``grpo``: a token counts as one of its answer's, an answer as one of all. ``dr_grpo``: a token counts
    as one of max_new_tokens, whatever the answer's length (Liu et al., 2025, https://arxiv.org/abs/2503.20783).
    """
    if grpo.loss_type == "dapo":
        return np.ones(len(num_tokens))
    divisor = num_tokens if grpo.loss_type == "grpo" else np.full(len(num_tokens), grpo.max_new_tokens)
    weights: Float[np.ndarray, " n"] = num_tokens.sum() / (len(num_tokens) * divisor)
    return weights
