"""Intervals: within what a score can be, around the score, and never of zero width where something was measured."""

import random
from collections.abc import Sequence

import pytest

from evals.answers import JoinedAnswers
from evals.benchmark import Benchmark, Graded
from evals.benchmarks.mmbench import ROTATION
from evals.catalogue import BENCHMARKS, make_benchmark
from evals.matching.object_counts import ObjectCounts
from evals.scoring import Result, compute_metric, summarize_result
from evals.statistics import wilson_interval

NOTHING_AMISS = JoinedAnswers({}, (), (), (), ())


def rows(name: str, num: int, rng: random.Random, share: float) -> list[Graded]:
    """Return grades as a benchmark gives them, of which about a share is right; 0 and 1 are exact."""
    found = []
    for i in range(num):
        right = rng.random() < share
        truth = rng.choice(["yes", "no"])
        said = truth if right else {"yes": "no", "no": "yes"}[truth]
        base, kind = f"q{i}", ("existence", "count", "code_reasoning")[i % 3]
        categories: tuple[str, ...] = {
            "science_qa": ("IMG" if i % 2 else "text", "natural science"),
            "mme": (kind,),
            "pope": (("random", "popular")[i % 2],),
            "hallusion_bench": ("VD", "VD x"),
        }.get(name, ("one", f"part {i % 2}"))
        if name == "mmbench":
            rights = [right] * 4 if right else [True, True, True, False]
            found += [
                Graded(str(i + k * ROTATION), float(r), "A", "scored", "A", categories, str(i), str(i))
                for k, r in enumerate(rights)
            ]
        elif name in ("chair", "amber_generative", "object_halbench"):
            counts = ObjectCounts(2, () if right else ("cat",), 1, 2, 0, 3)
            found.append(Graded(base, float(right), counts.to_json(), "scored", "", (), base))
        elif name == "mmhal_bench":
            found.append(Graded(base, 1.0 if right else 0.5, "6" if right else "3", "scored", "", categories, base))
        elif name == "llava_bench":
            scores = (8, 8) if right else (8, 2)
            found.append(Graded(base, scores[1] / 10, f"{scores[0]} {scores[1]}", "scored", "", categories, base))
        else:
            group = f"{kind}/{i // 6}" if name == "mme" else "figure"
            found.append(Graded(base, float(right), said, "scored", truth, categories, base, group))
    return found


def summary(benchmark: Benchmark, some: Sequence[Graded]) -> dict:
    total = benchmark.add_up(some, "robust")
    return summarize_result(
        Result(benchmark, "robust", some, NOTHING_AMISS, total, compute_metric(benchmark, some, "robust"))
    )


def check(ends: Sequence[float] | None, value: float | None, maximum: float) -> None:
    if ends is not None:
        assert value is not None
        assert 0 <= ends[0] <= value + 1e-3
        assert value - 1e-3 <= ends[1] <= max(maximum, value)
        assert ends[0] < ends[1]


@pytest.mark.parametrize("name", sorted(set(BENCHMARKS) - {"mmbench_cn"}))
def test_intervals_stay_within_what_a_score_can_be(name: str) -> None:
    benchmark, rng = make_benchmark(name), random.Random(7)
    for share in (0.0, 0.02, 0.5, 0.98, 1.0):
        for num in (2, 12, 60):
            found = summary(benchmark, rows(name, num, rng, share))
            check(found["confidence_interval"], found["score"], benchmark.maximum)
            for one in found["categories"].values():
                check(one["confidence_interval"], one["score"], benchmark.category_maximum)


@pytest.mark.parametrize(("name", "num"), [("science_qa", 30), ("mmbench", 60), ("gqa", 60), ("ai2d", 60)])
@pytest.mark.parametrize("share", [0.0, 1.0])
def test_shares_of_nothing_and_of_all_have_wilsons_interval(name: str, num: int, share: float) -> None:
    found = summary(make_benchmark(name), rows(name, 60, random.Random(1), share))
    ends = [100 * end for end in wilson_interval(round(share * num), num)]  # science_qa: of the half with an image
    assert found["confidence_interval"] == pytest.approx(ends, abs=1e-3)
    for one in found["categories"].values():
        ends = [100 * end for end in wilson_interval(round(share * one["num"]), one["num"])]
        assert one["confidence_interval"] == pytest.approx(ends, abs=1e-3)


@pytest.mark.parametrize(("name", "share"), [("pope", 0.0), ("pope", 1.0), ("mme", 0.0), ("mme", 1.0)])
def test_figures_that_are_no_shares_have_none_where_nothing_differs(name: str, share: float) -> None:
    found = summary(make_benchmark(name), rows(name, 60, random.Random(1), share))
    assert found["confidence_interval"] is None
    assert {one["confidence_interval"] for one in found["categories"].values()} == {None}


@pytest.mark.parametrize("name", ["science_qa", "pope", "mmbench", "mme", "llava_bench", "gqa"])
def test_every_category_has_an_interval(name: str) -> None:
    found = summary(make_benchmark(name), rows(name, 60, random.Random(3), 0.6))
    assert found["categories"]
    assert all(one["confidence_interval"] is not None for one in found["categories"].values())


def test_equal_grades_between_nothing_and_all_say_nothing_of_the_error() -> None:
    some = [Graded(f"q{i}", 0.3, "x", "scored", "y", ("one",), f"q{i}") for i in range(10)]
    found = summary(make_benchmark("vqav2"), some)
    assert (found["score"], found["confidence_interval"]) == (30, None)
