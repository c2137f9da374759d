"""Pairs: which answers are compared, who wins, and how the bias of length is measured and balanced away."""

from collections import Counter

import pytest

from pipelines.preference_pairs import (
    AnswerPair,
    CandidateAnswer,
    DecidedPair,
    balance_pair_lengths,
    choose_pairs,
    decide_by_scores,
    draw,
    drop_unusable,
    judge_pair,
    list_pairs,
    measure_length_bias,
    normalise,
)


def answers(*texts: str) -> list[CandidateAnswer]:
    return [CandidateAnswer(text, sample=number) for number, text in enumerate(texts)]


def test_every_pair_of_different_answers_is_listed_once() -> None:
    counts: Counter[str] = Counter()
    pairs = list_pairs("q", answers("Red", "red.", "blue", " RED ", "Blue"), 99, 0, counts)
    assert [pair.id for pair in pairs] == ["q#0.0|0.2"]
    assert counts == {"possible_pairs": 10, "equal_pairs": 4, "repeated_pairs": 5, "pairs_beyond_most": 0}
    assert len(list_pairs("q", answers(*"abcd"), 99, 0, Counter())) == 6
    assert list_pairs("q", answers("same", "Same."), 99, 0, Counter()) == []


def test_some_of_many_pairs_are_chosen_by_the_seed_alone() -> None:
    counts: Counter[str] = Counter()
    some = list_pairs("q", answers(*"abcdef"), 4, 7, counts)
    assert counts["pairs_beyond_most"] == 11
    assert some == list_pairs("q", answers(*"abcdef"), 4, 7, Counter())
    # More of them keep those that were chosen, so that nothing judged is lost.
    more = list_pairs("q", answers(*"abcdef"), 8, 7, Counter())
    assert set(some) < set(more)
    assert any(list_pairs("q", answers(*"abcdef"), 4, seed, Counter()) != some for seed in range(5))
    assert [pair.id for pair in more] == sorted(pair.id for pair in more)


def test_scores_tell_right_from_wrong_and_ties_are_none() -> None:
    counts: Counter[str] = Counter()
    scores = {"red": 1.0, "blue": 0.0, "dark red": 0.3, "unscored": None}
    found = decide_by_scores(
        "q", answers("blue", "red", "dark red", "unscored"), lambda a: scores[a.text], 9, 0, counts
    )
    assert [(one.pair.first.text, one.pair.second.text) for one in found] == [
        ("red", "blue"),
        ("dark red", "blue"),
        ("red", "dark red"),
    ]
    assert found[2].evidence == {"scores": {"chosen": 1.0, "rejected": 0.3}}
    assert counts["unscored_answers"] == 1
    assert decide_by_scores("q", answers("x", "y"), lambda a: 0.0, 9, 0, counts) == []
    assert counts["tied_pairs"] == 1


@pytest.mark.parametrize(
    ("leads", "verdict"),
    [
        ([2.0, 1.0], "first"),
        ([-0.5, -3.0], "second"),
        ([0.0, 0.0], "tied"),
        ([1.0, -1.0], "inconsistent"),
        ([1.0, 0.0], "inconsistent"),
        ([0.0, -1.0], "inconsistent"),
        ([None, 1.0], "failed"),
        ([None, None], "failed"),
        ([], "failed"),
        ([1.0, 1.0, 1.0, -1.0], "inconsistent"),
        ([1.0, 2.0, 3.0, 4.0], "first"),
    ],
)
def test_only_the_same_winner_in_every_review_wins(leads: list[float | None], verdict: str) -> None:
    assert judge_pair(leads, is_open=False) == verdict
    assert judge_pair(leads, is_open=True) == "open"


def test_answers_that_cannot_be_learnt_from_are_dropped_with_counts() -> None:
    given = [*answers("a", " ", ""), CandidateAnswer("cut", ended=False, sample=3)]
    counts: Counter[str] = Counter()
    assert [one.text for one in drop_unusable(given, counts, keep_cut_off=False)] == ["a"]
    assert counts == {"empty_answers": 2, "cut_off_answers": 1}
    assert [one.text for one in drop_unusable(given, Counter(), keep_cut_off=True)] == ["a", "cut"]


def decided(*pairs: tuple[str, str]) -> list[DecidedPair]:
    return [
        DecidedPair(AnswerPair(f"q{number}", CandidateAnswer(first), CandidateAnswer(second, sample=1)), {})
        for number, (first, second) in enumerate(pairs)
    ]


def test_length_bias_is_measured() -> None:
    some = decided(("long answer", "short"), ("a", "bbb"), ("xx", "yy"), ("longer", "no"))
    found = measure_length_bias(some)
    assert found == {
        "chosen_longer": 2,
        "rejected_longer": 1,
        "chosen_longer_share": 0.6667,
        "mean_length_difference": (6 - 2 + 0 + 4) / 4,
    }
    assert measure_length_bias([]) == {
        "chosen_longer": 0,
        "rejected_longer": 0,
        "chosen_longer_share": None,
        "mean_length_difference": None,
    }


def test_balancing_drops_the_most_unequal_pairs_of_the_larger_side() -> None:
    some = decided(("x" * 50, "x"), ("x" * 9, "x"), ("a", "bbb"), ("xx", "yy"), ("longer", "no"))
    kept = balance_pair_lengths(some, 0)
    assert [one.pair.question for one in kept] == ["q2", "q3", "q4"]
    assert measure_length_bias(kept)["chosen_longer_share"] == 0.5
    assert balance_pair_lengths(kept, 0) == kept
    other_way = decided(("x", "x" * 50), ("x", "x" * 9), ("bbb", "a"))
    assert [one.pair.question for one in balance_pair_lengths(other_way, 0)] == ["q1", "q2"]
    equal = decided(*[("longer", "no")] * 6, *[("no", "longer")] * 2)
    assert balance_pair_lengths(equal, 3) == balance_pair_lengths(equal, 3)
    assert len(balance_pair_lengths(equal, 3)) == 4


def test_draws_hang_on_their_words_and_fit_into_64_bits() -> None:
    assert draw(0, "q", 1) == draw(0, "q", 1)
    assert len({draw(seed, "q", sample) for seed in range(20) for sample in range(20)}) == 400
    assert all(0 <= draw(number) < 2**52 for number in range(50))
    assert normalise(" The  Red bus. ") == normalise("the red bus")
    assert choose_pairs([], 3, 0, Counter()) == []
