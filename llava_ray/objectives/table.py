"""The objectives by name. To add one, write its file beside this one and enter it here.

One with settings of its own is built of them.
"""

from llava_ray.config.finetune import FinetuneConfig
from llava_ray.config.grpo import GRPO
from llava_ray.config.preference import PAIR_OBJECTIVES
from llava_ray.objectives.cross_entropy import CrossEntropy
from llava_ray.objectives.grpo import Grpo
from llava_ray.objectives.objective import Objective
from llava_ray.objectives.preference import PairObjective


def build_objective(config: FinetuneConfig) -> Objective:
    """Return a run's objective with its settings."""
    name, grpo = config.train.objective, config.grpo
    if name in PAIR_OBJECTIVES:
        return PairObjective(name, config.preference)
    if name == GRPO:
        high = grpo.epsilon if grpo.epsilon_high is None else grpo.epsilon_high
        return Grpo(grpo.epsilon, high, grpo.beta, grpo.temperature)
    return CrossEntropy()


def build_held_out_objective(config: FinetuneConfig) -> Objective:
    """Return what held-out records are evaluated with: where a run learns from its own answers, theirs as they are."""
    return CrossEntropy() if config.train.objective == GRPO else build_objective(config)
