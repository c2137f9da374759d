"""From questions and answers to a result: joined, graded, added up, with its uncertainty, and honest about gaps."""

import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from evals.answers import Answer, Joined, join
from evals.benchmark import MISSING, Benchmark, Figure, Graded, Judge, Profile, Question, Total, graded
from evals.files import check_complete
from evals.published import whole_set
from evals.statistics import Estimate, estimate_mean, jackknife, wilson
from llava_ray.errors import DataError

_MAX_MISSING = 0.02
"""Share of questions without a score beyond which there is no headline."""
_MAX_LISTED = 100
_NO_ERROR = 1e-9
"""A standard error below it is none but for rounding."""


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
        return bool(self.rows) and self.num("missing") + self.num("failed") <= _MAX_MISSING * len(self.rows)

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
    check_truths(benchmark, questions)
    joined = join(questions, answers)
    known = joined.answers
    rows = [graded(q, benchmark.grade(q, known[q.id], profile, judge) if q.id in known else MISSING) for q in questions]
    total = benchmark.add_up(rows, profile)
    return Result(
        benchmark,
        profile,
        rows,
        joined,
        total,
        compute_figure(benchmark, rows, profile),
        versions() | dict(provenance or {}),
    )


def check_truths(benchmark: Benchmark, questions: Sequence[Question]) -> None:
    """Raise DataError if some questions have answers to score by and others have none."""
    without = [question.id for question in questions if not question.truths]
    if len(without) < len(questions):
        check_complete(without, len(questions), f"the data of {benchmark.title} have no right answer", "the question")


def compute_figure(
    benchmark: Benchmark, rows: Sequence[Graded], profile: Profile, category: str | None = None
) -> Estimate | None:
    """Return the headline, or the figure of a category's rows, with its error; None if there is no figure.

    Of a mean it is exact, of anything else it comes from leaving out groups of clusters.
    """
    averaged = benchmark.averaged(rows, category)
    if averaged is not None:
        judged = [row for row in averaged if row.state != "failed"]
        scores = [100 * row.score for row in judged]
        return estimate_mean(scores, [cluster_of(row) for row in judged]) if judged else None

    def figure(some: Sequence[Graded]) -> float | None:
        total = benchmark.add_up(some, profile) if some else Total(None)
        return total.headline if category is None else total.categories.get(category, Figure(None, 0)).value

    return jackknife(rows, cluster_of, figure)


def cluster_of(row: Graded) -> str:
    """Return what a row is counted with: its cluster, or itself."""
    return row.cluster or row.id


def _category_intervals(result: Result) -> dict[str, dict[str, Any]]:
    """Return the intervals of the categories' figures."""
    benchmark, found = result.benchmark, {}
    for name in result.total.categories:
        # A category that no row is in is that of all (ScienceQA's "all").
        rows = [row for row in result.rows if name in row.categories] or result.rows
        share = benchmark.averaged(rows, name) is not None
        estimated = compute_figure(benchmark, rows, result.profile, name)
        found[name] = interval(estimated, share=share, maximum=benchmark.category_maximum)
    return found


def summarize_result(result: Result) -> dict[str, Any]:
    """Return a result as one JSON object; without a headline, ``score`` is null and ``withheld`` says why."""
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
        "figures": {name: rounded(value) for name, value in result.total.figures.items()},
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
    """Return the summary of answers that cannot be scored here: what is missing, and why there is no number."""
    joined = join(questions, answers)
    nothing = Result(benchmark, profile, [], joined, Total(None), None, versions() | dict(provenance))
    return summarize_result(nothing) | {
        "withheld": reason,
        "num_questions": len(questions),
        "whole_set": whole_set(benchmark.name, len(questions)),
    }


def versions() -> dict[str, str]:
    """Return what scored: our version and Python's."""
    try:
        ours = version("llava_ray")
    except PackageNotFoundError:  # run from a folder that was never installed
        ours = "unknown"
    return {"llava_ray": ours, "python": platform.python_version()}


def interval(estimated: Estimate | None, *, share: bool = False, maximum: float | None = None) -> dict[str, Any]:
    """Return the 95 % interval, if there is one; with a ``maximum`` it stays within 0 and that (or a value beyond it).

    Where nothing differs, the error is 0 and says nothing: of a ``share`` of 0 or 100 % Wilson's interval does, of any
    other figure with a maximum there is no interval.
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
            return [rounded(100 * end) for end in wilson(right, num)]
    return None


def rounded(value: float | None) -> float | None:
    """Return a value with four decimals; numbers that are none stay out of JSON."""
    return None if value is None or not math.isfinite(value) else round(value, 4)
