"""Settings of held-out samples, and the score by which a run may end early or keep its best checkpoint."""

import re

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveInt

from llava_ray.config.data import DataConfig
from llava_ray.config.mixtures import held_out_paths
from llava_ray.config.preference import RecordKind
from llava_ray.config.schema import ConfigSection
from llava_ray.errors import ConfigError
from llava_ray.reading import short_repr

SCORE_PREFIX = "held_out_"
_HIGHER = frozenset({"accuracy", "accuracies", "margin", "margins", "reward", "rewards"})
_LOWER = frozenset({"loss", "kl", "perplexity"})
_NEITHER = frozenset({"rejected"})  # a rejected answer's reward is no score

# Settings of [held_out] that decide what a run's model is; the others only look at it.
SELECTING = ("metric", "early_stopping_patience", "early_stopping_min_delta", "keep_best")


class HeldOutConfig(ConfigSection):
    """Held-out data, evaluated whenever a run saves and never trained on."""

    path: str | None = None
    """Held-out samples, in any form that data.data_path accepts; None evaluates nothing."""
    kind: RecordKind = "auto"
    """What they are (see data.kind); "auto": as data.kind. A run over pairs may be evaluated on conversations."""
    images: str | None = None
    """Folder of their relative image paths; default: data.image_folder."""
    num_samples: PositiveInt = 512
    """Use only the first so many records for the loss; all of a prepared folder."""
    num_answers: NonNegativeInt = 128
    """Generate answers to the first so many of them; one is correct if it equals the record's, ignoring case."""
    max_new_tokens: PositiveInt = 16
    """Maximum length of an answer in tokens."""
    metric: str = "held_out_loss"
    """Score of an evaluation for early_stopping_patience and keep_best: held_out_loss, held_out_accuracy, one of a
    source (held_out_loss/NAME) or of the objective. Lower is better for a loss or kl, higher for an accuracy, margin or
    reward."""
    early_stopping_patience: PositiveInt | None = None
    """End the run after so many evaluations in a row without a better score; None never does."""
    early_stopping_min_delta: NonNegativeFloat = 0.0
    """A score counts as better for early stopping only if it is by more than this."""
    keep_best: bool = False
    """Write the final model from the checkpoint with the best score, not from the last one."""

    @property
    def selects(self) -> bool:
        """Return whether scores decide where the run ends, or which checkpoint becomes its model."""
        return self.keep_best or self.early_stopping_patience is not None


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


def has_held_out(held_out: HeldOutConfig, data: DataConfig) -> bool:
    """Return whether there are held-out samples, of the run or of a source."""
    return bool(held_out.path or held_out_paths(data))


def check_selection(held_out: HeldOutConfig, data: DataConfig) -> None:
    """Reject a score that no evaluation has, and settings of it without effect. Raises ValueError."""
    if not held_out.selects:
        for name in ("metric", "early_stopping_min_delta"):
            if getattr(held_out, name) != type(held_out).model_fields[name].default:
                raise ValueError(
                    f"held_out.{name} has no effect without held_out.early_stopping_patience or held_out.keep_best"
                )
        return
    if not has_held_out(held_out, data):
        raise ValueError(
            "held_out.early_stopping_patience and held_out.keep_best need held-out samples: set held_out.path, or "
            "held_out of a source"
        )
    base, slash, source = held_out.metric.partition("/")
    is_higher_better(held_out.metric)
    named = [one.name for one in data.sources if one.held_out is not None]
    if not base.startswith(SCORE_PREFIX) or (slash and source not in named):
        known = ", ".join(["held_out_loss", "held_out_accuracy", *(f"held_out_loss/{name}" for name in named)])
        raise ValueError(f"held_out.metric = {short_repr(held_out.metric)}: expected one such as {known}")
    if base == "held_out_accuracy" and not held_out.num_answers:
        raise ValueError("held_out.metric = 'held_out_accuracy' needs answers: set held_out.num_answers")
