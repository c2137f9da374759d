"""Scoring: join answers to questions, grade them, aggregate with uncertainty, and report gaps."""

import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from evals.answers import Answer, JoinedAnswers, match_answers
from evals.benchmark import MISSING, Benchmark, Graded, Judge, MetricValue, Profile, Question, Total, join_grade
from evals.files import check_complete
from evals.published import whole_set
from evals.statistics import Estimate, estimate_mean, jackknife, wilson_interval
from llava_ray.errors import DataError

_MAX_MISSING = 0.02
"""Share of questions without a score beyond which there is no headline."""
_MAX_LISTED = 100
_NO_ERROR = 1e-9
"""A smaller standard error is a rounding error."""


@dataclass(frozen=True)
class Result:
    """One benchmark scored under one profile."""

    benchmark: Benchmark
    profile: Profile
    rows: Sequence[Graded]
    joined: JoinedAnswers
    total: Total
    estimate: Estimate | None
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def num_scored(self) -> int:
        """Return the number of graded questions, parsed or not."""
        return self.num("scored") + self.num("unparsed")

    @property
    def complete(self) -> bool:
        """Return whether few enough scores are missing for a headline."""
        return bool(self.rows) and self.num("missing") + self.num("failed") <= _MAX_MISSING * len(self.rows)

    @property
    def score(self) -> float | None:
        """Return the headline, or None if more than 2 % are missing or failed."""
        return self.total.headline if self.complete else None

    def num(self, state: str) -> int:
        """Return the number of questions in a state."""
        return sum(row.state == state for row in self.rows)


def score_answers(
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
    check_truths(benchmark, questions)
    joined = match_answers(questions, answers)
    known = joined.answers
    rows = [
        join_grade(q, benchmark.grade(q, known[q.id], profile, judge) if q.id in known else MISSING) for q in questions
    ]
    total = benchmark.add_up(rows, profile)
    return Result(
        benchmark,
        profile,
        rows,
        joined,
        total,
        compute_metric(benchmark, rows, profile),
        find_versions() | dict(provenance or {}),
    )


def check_truths(benchmark: Benchmark, questions: Sequence[Question]) -> None:
    """Check that all questions or none have correct answers. Raises DataError."""
    without = [question.id for question in questions if not question.truths]
    if len(without) < len(questions):
        check_complete(without, len(questions), f"the data of {benchmark.title} have no right answer", "the question")


def compute_metric(
    benchmark: Benchmark, rows: Sequence[Graded], profile: Profile, category: str | None = None
) -> Estimate | None:
    """Compute the headline, or a category's metric, with its error; None if it is undefined.

    The error of a mean is exact, that of any other metric comes from the jackknife over clusters.
    """
    averaged = benchmark.averaged(rows, category)
    if averaged is not None:
        judged = [row for row in averaged if row.state != "failed"]
        scores = [100 * row.score for row in judged]
        return estimate_mean(scores, [cluster_of(row) for row in judged]) if judged else None

    def figure(some: Sequence[Graded]) -> float | None:
        total = benchmark.add_up(some, profile) if some else Total(None)
        return total.headline if category is None else total.categories.get(category, MetricValue(None, 0)).value

    return jackknife(rows, cluster_of, figure)


def cluster_of(row: Graded) -> str:
    """Return the cluster of a row: its own id without one."""
    return row.cluster or row.id


def _category_intervals(result: Result) -> dict[str, dict[str, Any]]:
    """Compute the intervals of the categories' metrics."""
    benchmark, found = result.benchmark, {}
    for name in result.total.categories:
        # A category without rows is that of all questions (ScienceQA's "all").
        rows = [row for row in result.rows if name in row.categories] or result.rows
        share = benchmark.averaged(rows, name) is not None
        estimated = compute_metric(benchmark, rows, result.profile, name)
        found[name] = interval(estimated, share=share, maximum=benchmark.category_maximum)
    return found


def summarize_result(result: Result) -> dict[str, Any]:
    """Convert a result to a JSON object; without a headline, ``score`` is null and ``withheld`` has the reason."""
    joined, estimated = result.joined, result.estimate
    intervals = _category_intervals(result)
    categories = {
        name: {"score": rounded(figure.value), "num": figure.num, **intervals[name]}
        for name, figure in result.total.categories.items()
    }
    is_share = result.benchmark.averaged(result.rows) is not None
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
        **interval(estimated, share=is_share, maximum=result.benchmark.maximum),
        "num_questions": num,
        "whole_set": whole_set(result.benchmark.name, num),
        "num_scored": result.num_scored,
        "missing": len(joined.missing),
        "duplicate": len(joined.duplicate),
        "conflicting": len(joined.conflicting),
        "extra": len(joined.extra),
        "unparsed": result.num("unparsed"),
        "failed": result.num("failed"),
        "figures": {name: rounded(value) for name, value in result.total.metrics.items()},
        "categories": categories,
        "ids": {
            "missing": joined.missing[:_MAX_LISTED],
            "duplicate": joined.duplicate[:_MAX_LISTED],
            "extra": joined.extra[:_MAX_LISTED],
            "unparsed": [row.id for row in result.rows if row.state == "unparsed"][:_MAX_LISTED],
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
    """Summarise answers that cannot be scored here: what is missing, and the reason."""
    joined = match_answers(questions, answers)
    nothing = Result(benchmark, profile, [], joined, Total(None), None, find_versions() | dict(provenance))
    return summarize_result(nothing) | {
        "withheld": reason,
        "num_questions": len(questions),
        "whole_set": whole_set(benchmark.name, len(questions)),
    }


def find_versions() -> dict[str, str]:
    """Return our version and Python's."""
    try:
        ours = version("llava_ray")
    except PackageNotFoundError:  # run from a source tree without installation
        ours = "unknown"
    return {"llava_ray": ours, "python": platform.python_version()}


def interval(estimated: Estimate | None, *, share: bool = False, maximum: float | None = None) -> dict[str, Any]:
    """Format the 95 % interval, if there is one; with a ``maximum`` it is clamped to 0 and that (or a larger value).

    If all scores are equal, the error of 0 is meaningless: a ``share`` of 0 or 100 % has Wilson's interval, any other
    metric with a maximum has none.
    """
    if estimated is None or not math.isfinite(estimated.standard_error):
        num = estimated.num_clusters if estimated else 0
        return {"confidence_interval": None, "standard_error": None, "num_clusters": num}
    low, high = estimated.low, estimated.high
    ends: list[float | None] | None = [rounded(low), rounded(high)]
    if maximum is not None:
        ends = [rounded(max(0.0, low)), rounded(min(max(maximum, estimated.value), high))]
        if estimated.standard_error < _NO_ERROR:
            ends = _wilson_ends(estimated) if share else None
    return {
        "confidence_interval": ends,
        "standard_error": rounded(estimated.standard_error),
        "num_clusters": estimated.num_clusters,
    }


def _wilson_ends(estimated: Estimate) -> list[float | None] | None:
    num = estimated.num_clusters
    for value, right in ((0.0, 0), (100.0, num)):
        if num and math.isclose(estimated.value, value, abs_tol=_NO_ERROR):
            return [rounded(100 * end) for end in wilson_interval(right, num)]
    return None


def rounded(value: float | None) -> float | None:
    """Round a value to four decimals; None for NaN and infinity, which JSON lacks."""
    return None if value is None or not math.isfinite(value) else round(value, 4)
