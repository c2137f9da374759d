"""Uncertainty: standard errors with and without clusters, Wilson's interval, jackknife, paired differences."""

import math
import zlib
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import TypeVar

Z = 1.959963984540054  # the 97.5 % quantile of the normal distribution
_MAX_GROUPS = 100

Row = TypeVar("Row")


@dataclass(frozen=True)
class Estimate:
    """A value, its standard error, and its number of clusters."""

    value: float
    standard_error: float
    num_clusters: int

    @property
    def low(self) -> float:
        """Return the lower end of the 95 % interval."""
        return self.value - Z * self.standard_error

    @property
    def high(self) -> float:
        """Return the upper end of the 95 % interval."""
        return self.value + Z * self.standard_error


def proportion_error(proportion: float, num: int) -> float:
    """Compute the standard error of a share of ``num``."""
    return math.sqrt(proportion * (1 - proportion) / num)


def standard_error(values: Sequence[float]) -> float:
    """Compute the standard error of a mean of independent values; inf for a single one."""
    num = len(values)
    if num < 2:
        return math.inf
    mean = sum(values) / num
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (num - 1) / num)


def clustered_error(values: Sequence[float], clusters: Sequence[Hashable]) -> float:
    """Compute the standard error of a mean of values that are correlated within clusters.

    The root of the sum of squared cluster sums of residuals, over n; no small-sample factor. One cluster: inf.
    """
    mean = sum(values) / len(values)
    residuals: dict[Hashable, float] = defaultdict(float)
    for value, cluster in zip(values, clusters, strict=True):
        residuals[cluster] += value - mean
    if len(residuals) < 2:
        return math.inf
    return math.sqrt(math.fsum(total**2 for total in residuals.values())) / len(values)


def wilson_interval(successes: int, num: int) -> tuple[float, float]:
    """Compute Wilson's 95 % interval of a share."""
    share, square = successes / num, Z**2
    middle = (share + square / (2 * num)) / (1 + square / num)
    half = Z / (1 + square / num) * math.sqrt(share * (1 - share) / num + square / (4 * num**2))
    return max(0.0, middle - half), min(1.0, middle + half)


def estimate_mean(values: Sequence[float], clusters: Sequence[Hashable]) -> Estimate:
    """Estimate a mean with its error, clustered if any cluster has several values."""
    num_clusters = len(set(clusters))
    error = clustered_error(values, clusters) if num_clusters < len(values) else standard_error(values)
    return Estimate(sum(values) / len(values), error, num_clusters)


def jackknife(
    rows: Sequence[Row], cluster: Callable[[Row], str], figure: Callable[[Sequence[Row]], float | None]
) -> Estimate | None:
    """Estimate any metric with its error by the jackknife over groups of clusters; None if it is undefined.

    The groups (at most 100) depend on the clusters' names alone, so the order of rows does not matter.
    """
    value = figure(rows)
    if value is None:
        return None
    names = sorted({cluster(row) for row in rows}, key=lambda name: (zlib.crc32(name.encode()), name))
    num_groups = min(len(names), _MAX_GROUPS)
    if num_groups < 2:
        return Estimate(value, math.inf, len(names))
    group_of = {name: number % num_groups for number, name in enumerate(names)}
    parts: list[list[Row]] = [[] for _ in range(num_groups)]
    for row in rows:
        for number in range(num_groups):
            if number != group_of[cluster(row)]:
                parts[number].append(row)
    others = [other for other in map(figure, parts) if other is not None]
    mean = sum(others) / len(others) if others else value
    spread = sum((other - mean) ** 2 for other in others)
    return Estimate(value, math.sqrt((num_groups - 1) / num_groups * spread), len(names))


def paired_difference(first: Sequence[float], second: Sequence[float], clusters: Sequence[Hashable]) -> Estimate:
    """Estimate the mean of first - second, question by question, with its error."""
    return estimate_mean([one - other for one, other in zip(first, second, strict=True)], clusters)


def sign_test(num_better: int, num_worse: int) -> float:
    """Compute the two-sided p-value of the exact sign test: that so few of either would occur by chance.

    For single questions that are right or wrong this is McNemar's exact test. Without any change it is 1.
    """
    num = num_better + num_worse
    tail = sum(math.comb(num, k) for k in range(min(num_better, num_worse) + 1))
    p_value: float = 2 * tail / 2**num
    return min(1.0, p_value)
