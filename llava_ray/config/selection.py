"""The score by which a run may end early or keep its best checkpoint: ``held_out.metric``, and what is better in it."""

import re
from typing import TYPE_CHECKING

from llava_ray.errors import ConfigError
from llava_ray.reading import short_repr

if TYPE_CHECKING:
    from llava_ray.config.sections import FinetuneConfig

SCORE_PREFIX = "held_out_"
_HIGHER = frozenset({"accuracy", "accuracies", "margin", "margins", "reward", "rewards"})
_LOWER = frozenset({"loss", "kl", "perplexity"})
_NEITHER = frozenset({"rejected"})  # a rejected answer's reward is no score

# Settings of [held_out] that decide what a run's model is; the others only look at it.
SELECTING = ("metric", "early_stopping_patience", "early_stopping_min_delta", "keep_best")


def is_higher_better(metric: str) -> bool:
    """Return the direction in which a score improves, by the words of its name. Raises ConfigError without any."""
    words = set(re.split(r"[^a-z]+", metric.partition("/")[0].lower()))
    higher, lower = bool(words & _HIGHER), bool(words & _LOWER)
    if higher == lower or words & _NEITHER:
        raise ConfigError(
            f"held_out.metric = {short_repr(metric)}: which direction is better is not known; expected a name with "
            f"{', '.join(sorted(_LOWER))} (lower is better) or {', '.join(sorted(_HIGHER))} (higher)"
        )
    return higher


def check_selection(config: "FinetuneConfig") -> None:
    """Reject a score that no evaluation has, and settings of it without effect. Raises ValueError."""
    held_out = config.held_out
    if not held_out.selects:
        for name in ("metric", "early_stopping_min_delta"):
            if getattr(held_out, name) != type(held_out).model_fields[name].default:
                raise ValueError(
                    f"held_out.{name} has no effect without held_out.early_stopping_patience or held_out.keep_best"
                )
        return
    if not config.evaluates:
        raise ValueError(
            "held_out.early_stopping_patience and held_out.keep_best need held-out samples: set held_out.path, or "
            "held_out of a source"
        )
    base, _, source = held_out.metric.partition("/")
    is_higher_better(held_out.metric)
    named = [one.name for one in config.data.sources if one.held_out is not None]
    if not base.startswith(SCORE_PREFIX) or (source and source not in named):
        known = ", ".join(["held_out_loss", "held_out_accuracy", *(f"held_out_loss/{name}" for name in named)])
        raise ValueError(f"held_out.metric = {short_repr(held_out.metric)}: expected one such as {known}")
    if base == "held_out_accuracy" and not held_out.num_answers:
        raise ValueError("held_out.metric = 'held_out_accuracy' needs answers: set held_out.num_answers")
