"""What reviews add up to: the reference's LBW and MMV vectors, biases, win rates, ratings."""

import math
import random

import pytest

from evals.ratings import Match, bradley_terry, compute_ratings
from evals.reviews import (
    Review,
    compute_length_metrics,
    compute_order_metrics,
    compute_review_headline,
    compute_sample_metrics,
    compute_win_rates,
    mean_grade,
    mean_score,
    review_relative_score,
)

PAIR = ("reference", "model")


def reviews(*scores: tuple[float, float] | None, order: str = "given", state: str = "failed") -> list[Review]:
    return [
        Review(f"q{n}", PAIR, order, 0, "done" if pair else state, pair, (10, 20), ("conv",), f"i{n}")  # type: ignore[arg-type]
        for n, pair in enumerate(scores)
    ]


def test_the_published_figure_is_the_ratio_of_means() -> None:
    found = compute_review_headline(reviews((8, 7), (9, 6), (10, 8)), review_relative_score, 0.02)
    assert found["score"] == pytest.approx(77.7778, abs=1e-4)
    some = reviews((8, 7), (9, 6), (10, 8))
    assert (10 * mean_score(some, 0), 10 * mean_score(some, 1)) == (90, 70)


def test_an_outage_is_no_result() -> None:
    found = compute_review_headline(reviews(None, None, None), review_relative_score, 0.02)
    assert (found["score"], found["computed_score"], found["failed"]) == (None, None, 3)
    assert found["withheld"] == "no review has scores"
    assert (
        compute_review_headline(reviews(None, None, None), review_relative_score, 1.0)["withheld"]
        == "no review has scores"
    )


def test_failures_are_in_no_mean() -> None:
    some = reviews((8, 4), (8, 4), None, None)
    assert review_relative_score(some) == 50.0
    found = compute_review_headline(some, review_relative_score, 0.02)
    assert (found["score"], found["computed_score"]) == (None, 50.0)
    assert found["withheld"] == "2 of 4 reviews have no scores (2 failed); at most 2% may lack them"
    assert compute_review_headline(some, review_relative_score, 0.5)["score"] == 50.0
    unparsed = compute_review_headline(reviews((8, 4), None, state="unparsed"), review_relative_score, 0.1)
    assert "1 unparsed" in unparsed["withheld"]


def test_mm_vet_counts_a_question_in_each_of_its_abilities() -> None:
    rows = [(1.0, ("rec", "ocr")), (0.5, ("rec",)), (0.0, ("math", "ocr"))]
    some = [Review(f"q{n}", ("m",), "given", 0, "done", (g,), (5,), c) for n, (g, c) in enumerate(rows)]
    found = compute_review_headline(some, mean_grade, 0.02)
    assert found["score"] == 50.0
    assert {name: one["score"] for name, one in found["categories"].items()} == {"rec": 75.0, "ocr": 50.0, "math": 0.0}


def test_samples_show_the_judges_own_spread() -> None:
    some = [Review("q", ("m",), "given", n, "done", (grade,), (5,), ()) for n, grade in enumerate((0.5, 0.7))]
    assert compute_sample_metrics(some, mean_grade) == {
        "num_samples": 2,
        "mean": 60.0,
        "std": pytest.approx(14.1421, abs=1e-4),
    }
    assert compute_sample_metrics(some[:1], mean_grade) == {"num_samples": 1}


def test_a_judge_that_likes_the_first_place_is_found_out() -> None:
    # Scores are in the answers' order: in "swapped", the second answer was shown first.
    given = reviews((9, 7), (9, 7), (8, 8), (5, 9))
    swapped = reviews((7, 9), (9, 7), (8, 8), None, order="swapped")
    found = compute_order_metrics([*given, *swapped])
    assert found["num_pairs"] == 3
    assert found["consistency"] == pytest.approx(2 / 3, abs=1e-4)
    assert found["first_wins"] == pytest.approx(3 / 4)  # of 4 decided: the first place won both of q0 and one of q1
    assert found["first_advantage"] == pytest.approx((2 + 2 + 2 - 2) / 6, abs=1e-4)
    assert compute_order_metrics(given)["consistency"] is None


def test_a_judge_that_likes_length_is_found_out() -> None:
    draw = random.Random(0)
    some = []
    for n in range(50):
        lengths = (draw.randint(10, 100), draw.randint(10, 100))
        lead = (lengths[1] - lengths[0]) / 20
        some.append(Review(f"q{n}", PAIR, "given", 0, "done", (5, 5 + lead), lengths))
    found = compute_length_metrics(some)
    assert found["length_correlation"] > 0.9
    assert found["longer_wins"] == 1.0
    assert compute_length_metrics([])["length_ratio"] is None


def test_both_orders_of_an_item_are_one_verdict() -> None:
    some = [
        Review("a", ("x", "y"), "given", 0, "done", (9, 5)),
        Review("a", ("x", "y"), "swapped", 0, "done", (6, 7)),
        Review("b", ("x", "y"), "given", 0, "done", (6, 7)),
        Review("b", ("x", "y"), "swapped", 0, "done", (7, 6)),
        Review("c", ("x", "y"), "given", 0, "failed"),
    ]
    found = compute_win_rates(some)["x", "y"]
    assert (found["won"], found["tied"], found["lost"], found["win_rate"]) == (1, 1, 0, 0.75)


def test_ratings_are_those_the_results_were_drawn_from() -> None:
    true = {"a": 1200.0, "b": 1000.0, "c": 800.0}
    draw = random.Random(1)
    matches = []
    for number in range(3000):
        first, second = draw.sample(sorted(true), 2)
        chance = 1 / (1 + 10 ** ((true[second] - true[first]) / 400))
        matches.append(Match(first, second, float(draw.random() < chance), f"i{number}"))
    found = compute_ratings(matches[:600])
    assert list(found) == ["a", "b", "c"]
    assert all(one.low <= one.rating <= one.high for one in found.values())
    exact = bradley_terry(matches)
    assert all(abs(exact[name] - true[name]) < 30 for name in true)


def test_ratings_of_two_are_their_odds() -> None:
    # With the half tie that every pair has: 3.25 to 1.25.
    found = bradley_terry([Match("a", "b", 1.0)] * 3 + [Match("b", "a", 1.0)])
    assert found["a"] - found["b"] == pytest.approx(400 * math.log10(3.25 / 1.25), abs=1e-6)
    assert bradley_terry([Match("a", "b", 1.0)] * 5)["a"] < 2000
