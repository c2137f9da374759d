"""The objectives by name. To add one, write its file beside this one and enter it here.

One with settings of its own is built of them.
"""

from collections.abc import Mapping

from llava_ray.config.sections import FinetuneConfig
from llava_ray.objectives.cross_entropy import CrossEntropy
from llava_ray.objectives.grpo import Grpo
from llava_ray.objectives.objective import Objective

OBJECTIVES: Mapping[str, Objective] = {"cross_entropy": CrossEntropy()}


def build_objective(config: FinetuneConfig) -> Objective:
    """Return a run's objective with its settings."""
    if config.train.objective != "grpo":
        return OBJECTIVES[config.train.objective]
    grpo = config.grpo
    high = grpo.epsilon if grpo.epsilon_high is None else grpo.epsilon_high
    return Grpo(grpo.epsilon, high, grpo.beta, grpo.temperature)


def build_held_out_objective(config: FinetuneConfig) -> Objective:
    """Return what held-out records are evaluated with: where a run learns from its own answers, theirs as they are."""
    return OBJECTIVES["cross_entropy"] if config.train.objective == "grpo" else build_objective(config)
