"""From questions and answers to a result: joined, graded, added up, with its uncertainty, and honest about gaps."""

import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from evals.answers import Answer, Joined, join
from evals.benchmark import MISSING, Benchmark, Graded, Judge, Profile, Question, Total, graded
from evals.statistics import Estimate, estimate_mean, jackknife, wilson
from llava_ray.errors import DataError

MAX_MISSING = 0.02
"""Share of questions without a score beyond which there is no headline."""
MAX_LISTED = 100


@dataclass(frozen=True)
class Result:
    """One benchmark scored under one profile."""

    benchmark: Benchmark
    profile: Profile
    rows: Sequence[Graded]
    joined: Joined
    total: Total
    estimate: Estimate | None
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def num_scored(self) -> int:
        """Questions with an answer that was graded, understood or not."""
        return self.num("scored") + self.num("unparsed")

    @property
    def complete(self) -> bool:
        """Whether few enough scores are missing for a headline."""
        return bool(self.rows) and self.num("missing") + self.num("failed") <= MAX_MISSING * len(self.rows)

    @property
    def score(self) -> float | None:
        """The headline, or None if more than 2 % are missing or failed."""
        return self.total.headline if self.complete else None

    def num(self, state: str) -> int:
        """Return the number of questions in a state."""
        return sum(row.state == state for row in self.rows)


def score(
    benchmark: Benchmark,
    questions: Sequence[Question],
    answers: Sequence[Answer],
    profile: Profile,
    judge: Judge | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> Result:
    """Score answers; a missing one counts as wrong. Raises DataError if nothing can be scored here."""
    if not questions:
        raise DataError(f"the data of {benchmark.title} hold no questions.")
    if not any(question.truths for question in questions):
        raise DataError(
            f"these questions of {benchmark.title} come without answers: only its server scores them; write the "
            "submission with --output FOLDER, or point to a split with answers"
        )
    joined = join(questions, answers)
    known = joined.answers
    rows = [graded(q, benchmark.grade(q, known[q.id], profile, judge) if q.id in known else MISSING) for q in questions]
    total = benchmark.add_up(rows, profile)
    return Result(
        benchmark, profile, rows, joined, total, estimate(benchmark, rows, profile), versions() | dict(provenance or {})
    )


def estimate(benchmark: Benchmark, rows: Sequence[Graded], profile: Profile) -> Estimate | None:
    """Return the headline with its error: of a mean exactly, of anything else by leaving out groups of clusters."""
    if not benchmark.is_mean:
        return jackknife(rows, cluster_of, lambda some: benchmark.add_up(some, profile).headline if some else None)
    judged = [row for row in rows if row.state != "failed"]
    return estimate_mean([100 * row.score for row in judged], [cluster_of(row) for row in judged]) if judged else None


def cluster_of(row: Graded) -> str:
    """Return what a row is counted with: its cluster, or itself."""
    return row.cluster or row.id


def category_estimates(result: Result) -> dict[str, Estimate]:
    """Return errors of the categories that are plain means."""
    if not result.benchmark.is_mean:
        return {}
    found = {}
    for name in result.total.categories:
        rows = [row for row in result.rows if name in row.categories and row.state != "failed"]
        if rows:
            found[name] = estimate_mean([100 * row.score for row in rows], [cluster_of(row) for row in rows])
    return found


def summarise(result: Result) -> dict[str, Any]:
    """Return a result as one JSON object; without a headline, ``score`` is null and ``withheld`` says why."""
    joined, estimated = result.joined, result.estimate
    errors = category_estimates(result)
    categories = {
        name: {"score": rounded(figure.value), "num": figure.num, **interval(errors.get(name), share=True)}
        for name, figure in result.total.categories.items()
    }
    num, gaps = len(result.rows), result.num("missing") + result.num("failed")
    withheld = (
        {} if result.complete else {"withheld": f"{gaps} of {num} questions have no score; at most 2 % may lack one"}
    )
    return {
        "benchmark": result.benchmark.name,
        "profile": result.profile,
        "metric": result.benchmark.metric,
        "score": rounded(result.score),
        "computed_score": rounded(result.total.headline),
        **withheld,
        **interval(estimated, share=result.benchmark.is_mean),
        "num_questions": num,
        "num_scored": result.num_scored,
        "missing": len(joined.missing),
        "duplicate": len(joined.duplicate),
        "conflicting": len(joined.conflicting),
        "extra": len(joined.extra),
        "unparsed": result.num("unparsed"),
        "failed": result.num("failed"),
        "figures": {name: rounded(value) for name, value in result.total.figures.items()},
        "categories": categories,
        "ids": {
            "missing": joined.missing[:MAX_LISTED],
            "duplicate": joined.duplicate[:MAX_LISTED],
            "extra": joined.extra[:MAX_LISTED],
            "unparsed": [row.id for row in result.rows if row.state == "unparsed"][:MAX_LISTED],
        },
        "provenance": dict(result.provenance),
    }


def summarise_unscored(
    benchmark: Benchmark,
    questions: Sequence[Question],
    answers: Sequence[Answer],
    profile: Profile,
    provenance: Mapping[str, Any],
    reason: str,
) -> dict[str, Any]:
    """Return the summary of answers that cannot be scored here: what is missing, and why there is no number."""
    joined = join(questions, answers)
    nothing = Result(benchmark, profile, [], joined, Total(None), None, versions() | dict(provenance))
    return summarise(nothing) | {
        "withheld": reason,
        "num_questions": len(questions),
    }


def versions() -> dict[str, str]:
    """Return what scored: our version and Python's."""
    try:
        ours = version("llava_ray")
    except PackageNotFoundError:  # run from a folder that was never installed
        ours = "unknown"
    return {"llava_ray": ours, "python": platform.python_version()}


def interval(estimated: Estimate | None, *, share: bool = False) -> dict[str, Any]:
    """Return the 95 % interval, if there is one; a ``share`` stays within 0 to 100.

    Where all answers are right, or all wrong, the error of a share is 0 and says nothing: Wilson's interval does.
    """
    if estimated is None or not math.isfinite(estimated.standard_error):
        num = estimated.num_clusters if estimated else 0
        return {"confidence_interval": None, "standard_error": None, "num_clusters": num}
    low, high = estimated.low, estimated.high
    if share:
        low, high = max(0.0, low), min(100.0, high)
        if estimated.standard_error == 0 and estimated.value in (0, 100):
            ends = wilson(estimated.num_clusters * (estimated.value == 100), estimated.num_clusters)
            low, high = 100 * ends[0], 100 * ends[1]
    return {
        "confidence_interval": [rounded(low), rounded(high)],
        "standard_error": rounded(estimated.standard_error),
        "num_clusters": estimated.num_clusters,
    }


def rounded(value: float | None) -> float | None:
    """Return a value with four decimals; numbers that are none stay out of JSON."""
    return None if value is None or not math.isfinite(value) else round(value, 4)
