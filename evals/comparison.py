"""Comparison of two results of the same benchmark, question by question."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from evals.benchmark import Benchmark, Graded, Profile
from evals.catalogue import make_benchmark
from evals.files import as_json, as_lines, read_json_value, read_lines
from evals.scoring import Result, cluster_of, interval, rounded, summarize_result
from evals.statistics import Estimate, jackknife, paired_difference, sign_test
from llava_ray.errors import ConfigError, DataError
from llava_ray.invocation import command

_RESULT, _GRADES = "result.json", "grades.jsonl"
_ENOUGH = 30  # clusters that differ, from which a sum of differences is about normal
_SETTINGS = ("prompt_hash", "template", "generation", "judge", "data_hash")


@dataclass(frozen=True)
class StoredResult:
    """A stored result: its summary and its grades."""

    summary: Mapping[str, Any]
    rows: Sequence[Graded]


def write_result(folder: Path, result: Result) -> None:
    """Save a result: its summary, and a line for each question."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _GRADES).write_bytes(as_lines([asdict(row) for row in result.rows]))
    (folder / _RESULT).write_bytes(as_json(summarize_result(result)))


def read_result(folder: Path) -> StoredResult:
    """Load a stored result from its folder, or from a file in it. Raises DataError."""
    folder = folder if folder.is_dir() else folder.parent
    if not (folder / _RESULT).exists() or not (folder / _GRADES).exists():
        raise DataError(
            f"{folder} has no {_RESULT} with {_GRADES}; make them with {command('evaluate', 'score')} --output {folder}"
        )
    rows = []
    for row in read_lines(folder / _GRADES):
        try:
            rows.append(Graded(**row | {"categories": tuple(row["categories"])}))
        except (TypeError, KeyError) as error:
            raise DataError(f"{folder / _GRADES}: a line is no grade: {error}; score the answers again.") from error
    return StoredResult(read_json_value(folder / _RESULT), rows)


def compare_results(first: StoredResult, second: StoredResult) -> dict[str, Any]:
    """Compute first - second over the common scored questions, with the 95 % interval.

    Where few of them differ, the interval may be too narrow: ``exact_p_value`` is then the sign test's (None where many
    differ). Raises ConfigError for results of different benchmarks or profiles, DataError for results without a common
    question.
    """
    for key in ("benchmark", "profile"):
        if first.summary[key] != second.summary[key]:
            raise ConfigError(
                f"the results differ in their {key}: {first.summary[key]!r} and {second.summary[key]!r}; only equal "
                "ones can be compared"
            )
    theirs = {row.id: row for row in second.rows if _has_score(row)}
    pairs = [(row, theirs[row.id]) for row in first.rows if _has_score(row) and row.id in theirs]
    if not pairs:
        raise DataError("the two results have no question in common")
    estimated = estimate_difference(str(first.summary["benchmark"]), first.summary["profile"], pairs)
    sure = math.isfinite(estimated.standard_error) and (estimated.low > 0 or estimated.high < 0)
    mine, other = (stored.summary.get("provenance", {}) for stored in (first, second))
    return {
        "benchmark": first.summary["benchmark"],
        "profile": first.summary["profile"],
        "first": first.summary["score"],
        "second": second.summary["score"],
        "difference": rounded(estimated.value),
        **interval(estimated),
        "significant": sure,
        "exact_p_value": _exact_p_value(pairs),
        "num_compared": len(pairs),
        "num_only_one": len(first.rows) + len(second.rows) - 2 * len(pairs),
        "better": sum(one.score > two.score for one, two in pairs),
        "worse": sum(one.score < two.score for one, two in pairs),
        "settings_that_differ": [key for key in _SETTINGS if mine.get(key) != other.get(key)],
    }


def estimate_difference(name: str, profile: Profile, pairs: Sequence[tuple[Graded, Graded]]) -> Estimate:
    """Estimate the difference of headlines, exactly for means, else by the jackknife over clusters."""
    benchmark = make_benchmark(name)
    clusters = [cluster_of(one) for one, _ in pairs]
    both = [[pair[side] for pair in pairs] for side in (0, 1)]
    if all(_averages_all(benchmark, rows) for rows in both):
        scores = [[100 * row.score for row in rows] for rows in both]
        return paired_difference(scores[0], scores[1], clusters)

    def headlines(some: Sequence[tuple[Graded, Graded]]) -> float | None:
        if not some:
            return None
        one, two = (benchmark.add_up([pair[side] for pair in some], profile).headline for side in (0, 1))
        return None if one is None or two is None else one - two

    estimated = jackknife(pairs, lambda pair: cluster_of(pair[0]), headlines)
    if estimated is None:
        raise DataError("the questions that both results have a score for give no headline")
    return estimated


def _exact_p_value(pairs: Sequence[tuple[Graded, Graded]]) -> float | None:
    """Return the sign test's p-value over clusters of questions; None where enough of them differ for the interval."""
    changes: dict[str, float] = defaultdict(float)
    for one, two in pairs:
        changes[cluster_of(one)] += one.score - two.score
    num_better, num_worse = (sum(sign * change > 0 for change in changes.values()) for sign in (1, -1))
    return sign_test(num_better, num_worse) if num_better + num_worse < _ENOUGH else None


def _averages_all(benchmark: Benchmark, rows: Sequence[Graded]) -> bool:
    """Return whether the headline is the mean over all rows, none left out (Object HalBench leaves some out)."""
    return benchmark.is_mean and len(benchmark.averaged(rows) or ()) == len(rows)


def _has_score(row: Graded) -> bool:
    """Return whether an answer exists and was graded."""
    return row.state in ("scored", "unparsed")
