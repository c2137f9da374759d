"""Penalties and biases are those of transformers and of OpenAI's formula, whoever else is in the batch."""

import random
from collections import Counter

import pytest
import torch
from transformers import MinPLogitsWarper, RepetitionPenaltyLogitsProcessor

from llava_ray.errors import RecordError
from llava_ray.generate.engine import Sampling
from llava_ray.generate.logit_edits import LogitEdits, check_biased_tokens, edit_rows, edits_logits
from llava_ray.generate.sampling import check_sampling, sample_tokens

VOCAB = 97
CPU = torch.device("cpu")


def by_hand(sampling: Sampling, prompt: list[int], answer: list[int], logits: torch.Tensor) -> torch.Tensor:
    """Biases, transformers' repetition penalty, and OpenAI's formula, over the whole vocabulary."""
    wanted = logits.clone()
    for token, bias in sampling.logit_bias:
        wanted[token] += bias
    seen = [token for token in prompt if token >= 0] + answer
    if seen and sampling.repetition_penalty != 1:
        processor = RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)
        wanted = processor(torch.tensor([seen]), wanted[None])[0]
    for token, count in Counter(answer).items():
        wanted[token] -= count * sampling.frequency_penalty + float(count > 0) * sampling.presence_penalty
    return wanted


def draw_sampling(draw: random.Random) -> Sampling:
    return Sampling(
        presence_penalty=draw.choice([0, 0, draw.uniform(-2, 2)]),
        frequency_penalty=draw.choice([0, 0, draw.uniform(-2, 2)]),
        repetition_penalty=draw.choice([1, 1, draw.uniform(0.3, 3)]),
        logit_bias=tuple((token, draw.uniform(-100, 100)) for token in draw.sample(range(VOCAB), draw.choice([0, 5]))),
    )


def test_300_rows_in_batches_are_those_of_transformers_and_openai() -> None:
    draw, generator = random.Random(1), torch.Generator().manual_seed(1)
    num_edited = 0
    for _ in range(30):
        rows = []
        for _ in range(10):
            sampling = draw_sampling(draw)
            prompt = draw.choices([-200, *range(VOCAB)], k=draw.randrange(40))
            answer = draw.choices(range(draw.choice([3, VOCAB])), k=draw.randrange(150))
            edits = LogitEdits(sampling, prompt, CPU) if edits_logits(sampling) else None
            for token in answer if edits is not None else ():
                edits.count(token)
            num_edited += edits is not None
            rows.append((sampling, prompt, answer, edits))
        logits = 4 * torch.randn(10, VOCAB, generator=generator)
        wanted = [by_hand(*row[:3], one) for row, one in zip(rows, logits, strict=True)]
        found = logits.clone()
        edit_rows([row[3] for row in rows], found)
        for (*_, edits), mine, its, plain in zip(rows, found, wanted, logits, strict=True):
            assert torch.equal(mine, plain) if edits is None else torch.allclose(mine, its, atol=1e-5)
    assert num_edited > 200


def test_min_p_is_that_of_transformers() -> None:
    generator = torch.Generator().manual_seed(2)
    for min_p in (0.01, 0.1, 0.5, 0.99):
        logits = 3 * torch.randn(60, VOCAB, generator=generator)
        kept = MinPLogitsWarper(min_p)(None, logits.clone()).softmax(-1)
        draws = torch.rand(60, generator=generator).tolist()
        found = sample_tokens(logits, [Sampling(temperature=1, min_p=min_p)] * 60, draws)
        sums = kept.double().cumsum(-1)
        assert found == [int((row <= number * row[-1]).sum()) for row, number in zip(sums, draws, strict=True)]
    both = [Sampling(temperature=1, min_p=1.0), Sampling(temperature=1)]
    assert sample_tokens(logits[:1].repeat(2, 1), both, [0.999, 0.999])[0] == int(logits[0].argmax())


@pytest.mark.parametrize("penalty", [5e-324, 1e-30, 1e30, 1.7e308])
def test_no_repetition_penalty_leaves_the_finite_numbers(penalty: float) -> None:
    edits = LogitEdits(Sampling(repetition_penalty=penalty), [0, 1, 2], CPU)
    logits = torch.tensor([3.0, -3.0, 0.0, 1.0])
    edits.apply(logits)
    assert logits.isfinite().all()
    [token] = sample_tokens(logits[None], [Sampling(temperature=1e-5)], [0.5])
    assert token == (0 if penalty < 1 else 3)


def test_a_long_answer_is_counted() -> None:
    edits = LogitEdits(Sampling(frequency_penalty=1.0), [5] * 9, CPU)
    for number in range(1000):
        edits.count(number % 300)
    logits = torch.zeros(310)
    edits.apply(logits)
    assert logits.tolist() == [-4.0] * 100 + [-3.0] * 200 + [0.0] * 10


def test_unknown_tokens_are_refused_by_field() -> None:
    check_biased_tokens(Sampling(logit_bias=((0, 1), (9, -100))), 10, range(10))
    for token, rows, known in ((10, 10, range(99)), (-1, 10, range(10)), (7, 10, {1, 2})):
        with pytest.raises(RecordError, match=f"logit_bias names tokens .*: {token}; expected ids below 10") as caught:
            check_biased_tokens(Sampling(logit_bias=((1, 1.0), (token, 1.0))), rows, known)
        assert caught.value.field == "logit_bias"


@pytest.mark.parametrize(
    "wrong",
    [
        {"min_p": -0.1},
        {"min_p": 1.1},
        {"min_p": float("nan")},
        {"presence_penalty": 2.1},
        {"presence_penalty": float("nan")},
        {"frequency_penalty": -2.1},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": -1.0},
        {"repetition_penalty": float("inf")},
        {"prompt_logprobs": -1},
        {"logit_bias": ((1, 100.1),)},
        {"logit_bias": ((1, float("nan")),)},
        {"logit_bias": tuple((token, 1.0) for token in range(1025))},
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused_by_field(wrong: dict[str, object]) -> None:
    [name] = wrong
    with pytest.raises(RecordError, match=f"{name} is") as caught:
        check_sampling(Sampling(**wrong))  # type: ignore[arg-type]
    assert caught.value.field == name
    assert len(str(caught.value)) < 200
