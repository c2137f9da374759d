"""The metrics of a step's sampled answers."""

import re
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from llava_ray.train.rollouts.advantages import find_spread
from llava_ray.train.rollouts.answered import RolloutGroup


def measure_rollouts(
    groups: Sequence[RolloutGroup],
    values: Float[np.ndarray, "n g k"],
    totals: Float[np.ndarray, "n g"],
    names: Sequence[str],
) -> dict[str, float]:
    """Return the metrics of a step's answers from their rewards, each of several, and the sums of these."""
    answers = [answer for group in groups for answer in group.answers]
    metrics = {
        "reward": totals.mean(),
        "reward_std": totals.std(),
        "group_reward_std": totals.std(axis=1, ddof=1).mean(),
        "no_spread_share": 1 - find_spread(totals).mean(),
        "answer_tokens": np.mean([len(answer.token_ids) for answer in answers]),
        "unfinished_share": np.mean([not answer.ended for answer in answers]),
    }
    if len(names) > 1:
        means = values.mean(axis=(0, 1))
        metrics |= {f"reward_{number}_{_plain(name)}": means[number] for number, name in enumerate(names)}
    return {name: float(value) for name, value in metrics.items()}


def _plain(name: str) -> str:
    """Return a reward's name as trackers accept it."""
    return re.sub(r"[^A-Za-z0-9_.]+", "_", name)[:40]
