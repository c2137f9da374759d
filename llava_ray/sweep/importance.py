"""The importance of settings: the share of variance between trials that each explains alone. Pure."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from llava_ray.config.space import Dimension, Space
from llava_ray.sweep.trial_ranking import find_common_step
from llava_ray.sweep.trials import LOSS, Trial

_FEWEST_TRIALS = 4
_CURVE_DEGREE = 2  # quadratic, so that an optimum in the middle of the range counts too


def compute_importance(trials: Sequence[Trial], space: Space, metric: str = LOSS) -> dict[str, float]:
    """Compute for each dimension the share (0 to 1) of the rank variance of ``metric`` that it explains alone.

    Trials are compared at the last step that all have reached, so that stopped ones count. Ranks, because one
    diverged trial would otherwise dominate the variance. Shares need not add up to 1. Empty with too few trials.
    """
    step = find_common_step(trials)
    evaluations = [(trial, trial.evaluation_at(step)) for trial in trials if step is not None]
    values = [(trial.settings, evaluation.value(metric)) for trial, evaluation in evaluations if evaluation]
    known = [(settings, value) for settings, value in values if value is not None and math.isfinite(value)]
    if len(known) < _FEWEST_TRIALS:
        return {}
    ranks = _ranked(np.asarray([value for _, value in known]))
    return {
        key: _explained([settings.get(key) for settings, _ in known], dimension, ranks)
        for key, dimension in space.dimensions.items()
    }


def _ranked(values: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Return ranks from 0; equal values have their mean rank."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts) - 1
    return (last - (counts - 1) / 2)[inverse]


def _explained(values: Sequence[Any], dimension: Dimension, target: Float[np.ndarray, " n"]) -> float:
    """Compute the share of the target's variance that group means, or a polynomial fit, explain.

    Adjusted for the number of groups or coefficients: with eight trials, four groups would explain 43 % of pure chance.
    """
    distinct = len({repr(value) for value in values})
    fits = [(_group_means(values, target), distinct)]
    numbers = _as_numbers(values, dimension)
    if numbers is not None and distinct > _CURVE_DEGREE + 1:
        curve = np.polyval(np.polyfit(numbers, target, _CURVE_DEGREE), numbers)
        fits.append((curve, _CURVE_DEGREE + 1))
    return max(0.0, *(_adjusted(target, fitted, count) for fitted, count in fits))


def _adjusted(target: Float[np.ndarray, " n"], fitted: Float[np.ndarray, " n"], num_parameters: int) -> float:
    """Compute the adjusted coefficient of determination; 0 without degrees of freedom."""
    num_free = len(target) - num_parameters
    total = float(np.square(target - target.mean()).sum())
    if num_free <= 0 or not total:
        return 0.0
    return 1 - float(np.square(target - fitted).sum()) / num_free / (total / (len(target) - 1))


def _as_numbers(values: Sequence[Any], dimension: Dimension) -> Float[np.ndarray, " n"] | None:
    """Return numeric values on the scale of their range; None for other values."""
    if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        return None
    numbers = np.asarray(values, float)
    spread_out = bool((numbers > 0).all()) and numbers.max() >= 10 * numbers.min()
    return np.log10(numbers) if dimension.log_uniform or (dimension.choice and spread_out) else numbers


def _group_means(values: Sequence[Any], target: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Compute for each trial the mean over those with the same value."""
    names = [repr(value) for value in values]
    means: Mapping[str, float] = {
        name: float(target[[other == name for other in names]].mean()) for name in dict.fromkeys(names)
    }
    return np.asarray([means[name] for name in names])
