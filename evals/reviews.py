"""Aggregation of reviews: relative scores, biases of the judge, win rates, and ratings of models.

Reviews without scores are excluded from means and counted; too many of them withhold the headline.
"""

import math
import statistics as plain
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from evals.benchmarks.llava_bench import relative_score
from evals.hallucination_replies import MAX_RATING
from evals.scoring import interval, rounded
from evals.statistics import Estimate, jackknife, wilson_interval

ReviewState = Literal["done", "unparsed", "failed", "open"]
"""``open``: not reviewed, because the job stopped, the budget was spent, or the answer is missing."""
MetricFunction = Callable[[Sequence["Review"]], float | None]


@dataclass(frozen=True)
class Review:
    """A review: the scores in the order of ``names``, whichever answer the judge saw first."""

    item: str
    names: tuple[str, ...]
    order: str
    """"given", or "swapped"."""
    sample: int
    state: ReviewState
    scores: tuple[float, ...] | None = None
    lengths: tuple[int, ...] = ()
    categories: tuple[str, ...] = ()
    cluster: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)


def review_relative_score(reviews: Sequence[Review]) -> float | None:
    """Compute 100 x mean score of second answers / mean of first ones (LLaVA's relative score)."""
    return relative_score([(r.scores[0], r.scores[1]) for r in reviews if r.scores is not None])


def mean_score(reviews: Sequence[Review], position: int = 0) -> float | None:
    """Compute the mean score of the answers at a position."""
    found = [review.scores[position] for review in reviews if review.scores is not None]
    return sum(found) / len(found) if found else None


def mean_grade(reviews: Sequence[Review]) -> float | None:
    """Compute 100 x the mean of grades from 0 to 1 (MM-Vet's score)."""
    mean = mean_score(reviews)
    return None if mean is None else 100 * mean


def mean_rating(reviews: Sequence[Review]) -> float | None:
    """Compute the mean of ratings from 0 to 6 (MMHal-Bench's score)."""
    return mean_score(reviews)


def mean_num_objects(reviews: Sequence[Review]) -> float | None:
    """Compute the mean number of objects that an answer names (Object HalBench's first step)."""
    return mean_score(reviews)


_MAXIMA: dict[MetricFunction, float] = {mean_score: 10.0, mean_grade: 100.0, mean_rating: float(MAX_RATING)}
"""Maxima of metrics that have one; a relative score may exceed 100."""


def _estimate(reviews: Sequence[Review], figure: MetricFunction) -> Estimate | None:
    """Estimate a metric with its error by the jackknife over clusters."""
    scored = [review for review in reviews if review.scores is not None]
    return jackknife(scored, lambda review: review.cluster or review.item, figure)


def _counts(reviews: Sequence[Review]) -> dict[str, int]:
    """Count the reviews in each state."""
    states = [review.state for review in reviews]
    return {"num_reviews": len(states)} | {
        state: states.count(state) for state in ("done", "unparsed", "failed", "open")
    }


def explain_withheld(reviews: Sequence[Review], max_failed: float) -> str | None:
    """Return the reason for withholding the headline, if too many reviews have no scores; None otherwise."""
    found = _counts(reviews)
    gaps = found["num_reviews"] - found["done"]
    if not found["done"]:
        return "no review has scores"
    if gaps <= max_failed * found["num_reviews"]:
        return None
    parts = ", ".join(f"{found[state]} {state}" for state in ("failed", "unparsed", "open") if found[state])
    return f"{gaps} of {found['num_reviews']} reviews have no scores ({parts}); at most {max_failed:.0%} may lack them"


def compute_review_headline(reviews: Sequence[Review], figure: MetricFunction, max_failed: float) -> dict[str, Any]:
    """Compute a metric of all reviews and by category, with intervals, or the reason for withholding it."""
    categories: dict[str, list[Review]] = defaultdict(list)
    for review in reviews:
        for name in review.categories:
            categories[name].append(review)
    why = explain_withheld(reviews, max_failed)
    value = figure(reviews)
    maximum = _MAXIMA.get(figure, math.inf)
    return {
        "score": None if why else rounded(value),
        "computed_score": rounded(value),
        **({"withheld": why} if why else {}),
        **interval(_estimate(reviews, figure), maximum=maximum),
        **_counts(reviews),
        "categories": {
            name: {
                "score": rounded(figure(some)),
                **interval(_estimate(some, figure), maximum=maximum),
                **_counts(some),
            }
            for name, some in sorted(categories.items())
        },
    }


def pair_orders(reviews: Sequence[Review]) -> list[tuple[Review, Review]]:
    """Return pairs of reviews in both orders: as given, and swapped."""
    found: dict[tuple[str, tuple[str, ...], int], dict[str, Review]] = defaultdict(dict)
    for review in reviews:
        if review.scores is not None:
            found[review.item, review.names, review.sample][review.order] = review
    return [(pair["given"], pair["swapped"]) for pair in found.values() if len(pair) == 2]


def compute_order_metrics(reviews: Sequence[Review]) -> dict[str, Any]:
    """Compute the judge's position bias.

    ``consistency``: share of items with the same winner (or a tie) in both orders. ``first_wins``: share of decided
    reviews won by the answer that was shown first; .5 is fair. ``first_advantage``: points the first place is worth.
    """
    pairs = pair_orders(reviews)
    if not pairs:
        return {"num_pairs": 0, "consistency": None, "first_wins": None, "first_advantage": None}
    same = sum(_winner(given) == _winner(swapped) for given, swapped in pairs)
    in_order = [_as_shown(review) for pair in pairs for review in pair]
    decided = [first > second for first, second in in_order if first != second]
    return {
        "num_pairs": len(pairs),
        "consistency": rounded(same / len(pairs)),
        "consistency_interval": [rounded(end) for end in wilson_interval(same, len(pairs))],
        "first_wins": rounded(sum(decided) / len(decided)) if decided else None,
        "first_advantage": rounded(sum(first - second for first, second in in_order) / len(in_order)),
    }


def compute_length_metrics(reviews: Sequence[Review]) -> dict[str, Any]:
    """Compute the judge's length bias.

    ``length_ratio``: characters of the second answers / of the first ones. ``length_correlation``: of an answer's share
    of both lengths with its lead in points. ``longer_wins``: share of decided reviews that the longer answer won.
    """
    scored = [r for r in reviews if r.scores is not None and len(r.lengths) == 2 and any(r.lengths)]
    shares = [review.lengths[1] / sum(review.lengths) for review in scored]
    leads = [review.scores[1] - review.scores[0] for review in scored if review.scores is not None]
    firsts = sum(review.lengths[0] for review in scored)
    decided = [(lead > 0) == (share > 0.5) for lead, share in zip(leads, shares, strict=True) if lead and share != 0.5]
    varied = len(scored) > 2 and len(set(shares)) > 1 and len(set(leads)) > 1
    return {
        "length_ratio": rounded(sum(review.lengths[1] for review in scored) / firsts) if firsts else None,
        "length_correlation": rounded(plain.correlation(shares, leads)) if varied else None,
        "longer_wins": rounded(sum(decided) / len(decided)) if decided else None,
    }


def compute_sample_metrics(reviews: Sequence[Review], figure: MetricFunction) -> dict[str, Any]:
    """Compute a metric's mean and standard deviation over samples, the judge's variance (MM-Vet's mean ± std)."""
    samples = sorted({review.sample for review in reviews})
    values = [value for sample in samples if (value := figure([r for r in reviews if r.sample == sample])) is not None]
    if len(values) < 2:
        return {"num_samples": len(values)}
    return {"num_samples": len(values), "mean": rounded(plain.mean(values)), "std": rounded(plain.stdev(values))}


def compute_win_rates(reviews: Sequence[Review]) -> dict[tuple[str, str], dict[str, Any]]:
    """Compute for each pair of models the first one's wins, ties, losses and win rate (a tie is half).

    Both orders of an item are one verdict: the sum of the leads decides.
    """
    leads: dict[tuple[str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for review in reviews:
        if review.scores is not None:
            leads[review.names[0], review.names[1]][review.item].append(review.scores[0] - review.scores[1])
    found = {}
    for pair, items in leads.items():
        totals = [math.fsum(some) for some in items.values()]
        won, lost = sum(total > 0 for total in totals), sum(total < 0 for total in totals)
        decided = won + lost
        found[pair] = {
            "won": won,
            "tied": len(totals) - decided,
            "lost": lost,
            "win_rate": rounded((won + (len(totals) - decided) / 2) / len(totals)),
            "interval_of_decided": [rounded(end) for end in wilson_interval(won, decided)] if decided else None,
        }
    return found


def _winner(review: Review) -> int:
    assert review.scores is not None
    return (review.scores[0] > review.scores[1]) - (review.scores[0] < review.scores[1])


def _as_shown(review: Review) -> tuple[float, float]:
    assert review.scores is not None
    first, second = review.scores[0], review.scores[1]
    return (first, second) if review.order == "given" else (second, first)
