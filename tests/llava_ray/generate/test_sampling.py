"""Each row is sampled under its own settings, from the distribution that they describe."""

from collections import Counter

import pytest
import torch

from llava_ray.errors import RecordError
from llava_ray.generate.engine import Sampling
from llava_ray.generate.sampling import (
    check_sampling,
    compute_logprobs,
    find_finite_rows,
    find_threshold,
    sample_tokens,
)

LOGITS = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()


def shares(sampling: Sampling, num_draws: int = 400) -> list[float]:
    draws = [(index + 0.5) / num_draws for index in range(num_draws)]
    tokens = sample_tokens(LOGITS.repeat(num_draws, 1), [sampling] * num_draws, draws)
    counts = Counter(tokens)
    return [round(counts[token] / num_draws, 3) for token in range(4)]


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(temperature=0), [1, 0, 0, 0]),
        (Sampling(temperature=1), [0.5, 0.3, 0.15, 0.05]),
        (Sampling(temperature=1e-6), [1, 0, 0, 0]),
        (Sampling(temperature=1, top_k=2), [0.625, 0.375, 0, 0]),
        (Sampling(temperature=1, top_p=0.5), [1, 0, 0, 0]),
        (Sampling(temperature=1, top_p=0.6), [0.625, 0.375, 0, 0]),
        (Sampling(temperature=1, top_k=2, top_p=0.7), [0.625, 0.375, 0, 0]),
        (Sampling(temperature=1, top_k=9, top_p=1e-9), [1, 0, 0, 0]),
    ],
)
def test_distributions(sampling: Sampling, expected: list[float]) -> None:
    assert shares(sampling) == pytest.approx(expected, abs=0.006)


def test_rows_do_not_mix() -> None:
    settings = [Sampling(), Sampling(temperature=1, top_k=1), Sampling(temperature=1), Sampling(temperature=1)]
    assert sample_tokens(LOGITS.repeat(4, 1), settings, [0.9, 0.9, 0.9, 0.0]) == [0, 0, 2, 0]
    assert sample_tokens(LOGITS, [Sampling(temperature=1)], [1 - 2**-53]) == [3]


def test_the_border_of_top_p_in_a_flat_distribution() -> None:
    flat = torch.linspace(0, 1e-3, 3000)
    kept = flat >= find_threshold(flat, 0.9)
    assert float(flat.softmax(0)[kept].sum()) == pytest.approx(0.9, abs=1e-3)


def test_logprobs() -> None:
    [(mine, best)] = compute_logprobs(LOGITS + 3, [2], 2)
    assert mine == pytest.approx(-1.897, abs=1e-3)
    assert [token for token, _ in best] == [0, 1]
    assert compute_logprobs(LOGITS, [0], 0)[0][1] == []


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": float("nan")},
        {"temperature": -1.0},
        {"temperature": float("inf")},
        {"top_p": 0.0},
        {"top_p": float("nan")},
        {"top_k": -1},
        {"max_tokens": 0},
        {"logprobs": -1},
        {"stop": ("a", "")},
    ],
)
def test_impossible_settings(wrong: dict[str, object]) -> None:
    with pytest.raises(RecordError, match=next(iter(wrong))):
        check_sampling(Sampling(**wrong))  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [0, 2, 3])
def test_rows_with_a_logit_that_is_not_finite_are_found(bad: float, place: int) -> None:
    logits = LOGITS.repeat(3, 1)
    logits[1, place] = bad
    assert find_finite_rows(logits) == [True, False, True]
    assert find_finite_rows(torch.full((2, 4), bad)) == [False, False]


def test_huge_logits_are_finite_and_a_temperature_next_to_nothing_takes_the_likeliest() -> None:
    assert find_finite_rows(LOGITS * 1e38) == [True]
    for temperature in (1e-5, 1e-9, 1e-45, 1e-320):
        assert shares(Sampling(temperature=temperature), 10) == [1, 0, 0, 0]
