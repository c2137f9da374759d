"""The learning rate schedule."""

import math
from collections.abc import Callable

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from llava_ray.config.train import TrainConfig

_DECAY_SHARE = 0.3  # of the steps after the warm-up, in "warmup_stable_decay"

# The share of the learning rate that is left after a share of the steps.
_SHAPES: dict[str, Callable[[float], float]] = {
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
    "linear": lambda done: 1 - done,
    "constant": lambda done: 1.0,
    "warmup_stable_decay": lambda done: min(1.0, (1 - done) / _DECAY_SHARE),
}


def schedule(optimizer: Optimizer, train: TrainConfig, num_steps: int) -> LRScheduler:
    """Return LLaVA's schedule: a linear warm-up, then the named shape down to the last step.

    These are the formulas of transformers' ``get_scheduler``, whose import brings PEFT, bitsandbytes and torch's
    compiler along: three seconds of every worker's start.
    """
    num_warmup = math.ceil(train.warmup_ratio * num_steps)
    shape = _SHAPES[train.lr_scheduler_type]

    def factor(step: int) -> float:
        if step < num_warmup:
            return step / num_warmup
        return shape(min(1.0, (step - num_warmup) / max(1, num_steps - num_warmup)))

    return LambdaLR(optimizer, factor)
