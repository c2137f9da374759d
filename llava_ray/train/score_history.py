"""The scores of a run's evaluations so far: whether it has stopped improving, and which checkpoint is the best.

They are written into each checkpoint and read from the one that a start resumes from, so where a run ends follows from
what is committed: no kill can change it.
"""

import math
from collections.abc import Iterable, Mapping, Sequence

from llava_ray.config.held_out import SCORE_PREFIX, HeldOutConfig, is_higher_better
from llava_ray.errors import ConfigError

KEPT_BY = "kept_by"  # a checkpoint's metric by which Ray keeps the best one
_NOT_BEST = -1.0


class ScoreHistory:
    """The evaluations of one run by ``held_out.metric``; none where scores decide nothing."""

    def __init__(self, held_out: HeldOutConfig, scores: Iterable[Sequence[float | None]] = ()) -> None:
        """Continue from ``scores``: pairs of the steps taken and the score, None for one that is not finite."""
        self.held_out = held_out
        self.scores: list[tuple[int, float | None]] = [(int(step or 0), score) for step, score in scores]

    def add(self, step: int, metrics: Mapping[str, float]) -> None:
        """Note the evaluation after ``step`` steps."""
        if self.held_out.selects and metrics:
            score = metrics.get(self.held_out.metric)
            if score is None:  # no question, for one
                raise ConfigError(
                    f"held_out.metric = {self.held_out.metric!r}: the evaluation after step {step} has only "
                    f"{', '.join(metrics)}; choose one of them"
                )
            self.scores.append((step, score if math.isfinite(score) else None))

    @property
    def best(self) -> tuple[int, float] | None:
        """Return the steps and the score of the best evaluation, the first of equal ones; None without any."""
        found: tuple[int, float] | None = None
        for step, score in self.scores:
            if score is not None and (found is None or self._gain(score, found[1]) > 0):
                found = step, score
        return found

    @property
    def has_stalled(self) -> bool:
        """Return whether the last evaluations, as many as the patience, were no better than the best before them."""
        patience, least = self.held_out.early_stopping_patience, self.held_out.early_stopping_min_delta
        reference: float | None = None
        waited = 0
        for _, score in self.scores:
            if score is not None and (reference is None or self._gain(score, reference) > least):
                reference, waited = score, 0
            else:
                waited += 1
        return patience is not None and waited >= patience

    @property
    def model_step(self) -> int | None:
        """Return the steps of the checkpoint that the final model is to be of; None for the last."""
        return self.best[0] if self.held_out.keep_best and self.best else None

    def rank_of(self, step: int) -> float:
        """Return a number by which Ray keeps the best checkpoint: it grows with each that is better than all before."""
        return float(step) if self.best and self.best[0] == step else _NOT_BEST

    def describe_end(self, step: int) -> str:
        """Say why the run ends after ``step`` steps."""
        metric, patience = self.held_out.metric, self.held_out.early_stopping_patience
        found = f"its best was {self.best[1]:.4g} after step {self.best[0]}" if self.best else "it never was finite"
        return f"Stopped early after step {step}: {patience} evaluation(s) without a better {metric}; {found}"

    def _gain(self, score: float, before: float) -> float:
        """Return by how much a score is better than another."""
        return score - before if is_higher_better(self.held_out.metric) else before - score


def check_score(held_out: HeldOutConfig, metric_names: Sequence[str]) -> None:
    """Raise ConfigError for a score that evaluations with the objective's ``metric_names`` do not have."""
    known = [f"{SCORE_PREFIX}{name}" for name in ("loss", "accuracy", *metric_names)]
    if held_out.selects and held_out.metric.partition("/")[0] not in known:
        raise ConfigError(f"held_out.metric = {held_out.metric!r}: evaluations of this run have {', '.join(known)}")
