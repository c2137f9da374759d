"""Ratings of models from pairwise comparisons: Bradley-Terry on Elo's scale, with bootstrap intervals."""

import math
import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_SCALE, _CENTRE = 400.0, 1000.0
"""Elo's: 400 points are odds of ten to one. The mean of all models is 1000."""
_NUM_STEPS, _ENOUGH = 10_000, 1e-10
_PRIOR = 0.5
"""Prior ties between each two compared models, so that a model that won everything has a finite rating."""
_NUM_RESAMPLES = 200


@dataclass(frozen=True)
class Match:
    """Two models on one item: 1 if the first won, 0 if the second did, 0.5 for a tie."""

    first: str
    second: str
    result: float
    cluster: str = ""


@dataclass(frozen=True)
class Rating:
    """A model's rating, its 95 % interval, and its number of matches."""

    rating: float
    low: float
    high: float
    num_matches: int


def compute_ratings(matches: Sequence[Match], seed: int = 0) -> dict[str, Rating]:
    """Compute ratings, the best model first; the interval resamples whole clusters."""
    ratings = bradley_terry(matches)
    clusters: dict[str, list[Match]] = defaultdict(list)
    for number, match in enumerate(matches):
        clusters[match.cluster or str(number)].append(match)
    names, draw = sorted(clusters), random.Random(seed)
    drawn: dict[str, list[float]] = defaultdict(list)
    for _ in range(_NUM_RESAMPLES):
        some = [match for name in draw.choices(names, k=len(names)) for match in clusters[name]]
        for model, rating in bradley_terry(some).items():
            drawn[model].append(rating)
    found = {}
    for model in sorted(ratings, key=lambda name: (-ratings[name], name)):
        ends = sorted(drawn[model]) or [ratings[model]]
        low, high = ends[int(0.025 * len(ends))], ends[min(len(ends) - 1, int(0.975 * len(ends)))]
        num = sum(model in (match.first, match.second) for match in matches)
        found[model] = Rating(ratings[model], low, high, num)
    return found


def bradley_terry(matches: Sequence[Match]) -> dict[str, float]:
    """Compute the maximum-likelihood strengths (Hunter 2004's MM steps) on Elo's scale.

    The Newman 2023 form of the step, which needs a tenth of the rounds: strength = won over / lost over.
    """
    wins: dict[tuple[str, str], float] = defaultdict(float)
    for match in matches:
        wins[match.first, match.second] += match.result
        wins[match.second, match.first] += 1 - match.result
    for pair in list(wins):
        wins[pair] += _PRIOR / 2
    models = sorted({model for pair in wins for model in pair})
    strengths = dict.fromkeys(models, 1.0)
    for _ in range(_NUM_STEPS):
        change = 0.0
        for model in models:
            updated = _step(model, strengths, wins)
            change = max(change, abs(math.log(updated / strengths[model])))
            strengths[model] = updated
        if change < _ENOUGH:
            break
    logs = {model: math.log10(strengths[model]) for model in models}
    mean = math.fsum(logs.values()) / max(1, len(logs))
    return {model: _CENTRE + _SCALE * (logs[model] - mean) for model in models}


def _step(model: str, strengths: Mapping[str, float], wins: Mapping[tuple[str, str], float]) -> float:
    mine, over, under = strengths[model], 0.0, 0.0
    for (winner, loser), times in wins.items():
        if winner == model:
            other = strengths[loser]
            over += times * other / (mine + other)
        elif loser == model:
            under += times / (mine + strengths[winner])
    return over / under
