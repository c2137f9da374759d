import math

import pytest

from evals.statistics import (
    clustered_error,
    estimate_mean,
    jackknife,
    paired_difference,
    proportion_error,
    sign_test,
    standard_error,
    wilson_interval,
)


def bits(text: str) -> list[float]:
    return [float(bit) for bit in text]


def test_error_of_a_share() -> None:
    assert proportion_error(0.85, 1000) == pytest.approx(0.011292, abs=1e-6)
    assert 1.96 * proportion_error(0.85, 1000) == pytest.approx(0.02213, abs=1e-5)


@pytest.mark.parametrize(
    ("successes", "num", "low", "high"),
    [(43, 60, 0.5923, 0.8149), (0, 10, 0, 0.2775), (10, 10, 0.7225, 1), (500, 1000, 0.4691, 0.5309)],
)
def test_wilson(successes: int, num: int, low: float, high: float) -> None:
    assert wilson_interval(successes, num) == pytest.approx((low, high), abs=5e-5)


def test_clusters_widen_the_error() -> None:
    values, clusters = bits("111000101"), list("aaabbbccc")
    assert standard_error(values) == pytest.approx(0.17568, abs=1e-5)
    assert clustered_error(values, clusters) == pytest.approx(0.24003, abs=1e-5)
    estimate = estimate_mean(values, clusters)
    assert (estimate.value, estimate.num_clusters) == (pytest.approx(0.5556, abs=1e-4), 3)
    assert estimate.standard_error == pytest.approx(0.24003, abs=1e-5)
    assert estimate.high - estimate.value == pytest.approx(1.96 * 0.24003, abs=1e-4)
    assert estimate_mean(values, range(9)).standard_error == pytest.approx(0.17568, abs=1e-5)


def test_pairs() -> None:
    found = paired_difference(bits("11011011"), bits("10010010"), range(8))
    assert (found.value, found.standard_error) == (pytest.approx(0.375), pytest.approx(0.18298, abs=1e-5))


def test_one_cluster_says_nothing_of_the_error() -> None:
    assert standard_error([1.0]) == math.inf
    assert clustered_error([1.0, 0.0], ["a", "a"]) == math.inf


def test_the_jackknife_of_a_mean_is_its_plain_error_and_knows_no_order() -> None:
    rows = list(enumerate(bits("1101101110010010")))

    def mean(some: list[tuple[int, float]]) -> float:
        return sum(value for _, value in some) / len(some)

    found = jackknife(rows, lambda row: str(row[0]), mean)
    assert found is not None
    assert found.standard_error == pytest.approx(standard_error([value for _, value in rows]))
    assert jackknife(rows[::-1], lambda row: str(row[0]), mean) == found
    assert jackknife(rows, lambda row: "one", mean).standard_error == math.inf
    assert jackknife(rows, lambda row: str(row[0]), lambda some: None) is None


def test_the_sign_test_is_exact() -> None:
    assert sign_test(0, 0) == 1
    assert sign_test(1, 0) == sign_test(0, 1) == 1
    assert sign_test(3, 0) == 0.25
    assert sign_test(6, 0) == 0.03125
    assert sign_test(8, 2) == pytest.approx(0.109375)
    assert sign_test(5, 5) == 1
