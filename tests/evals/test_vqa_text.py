"""Soft accuracy and its normalisers: each column of the reference vectors."""

import pytest

from evals.benchmark import Question
from evals.benchmarks.vqav2 import VQAv2, grade_by_humans
from evals.matching.vqa_text import (
    llava_accuracy,
    normalise_evalai,
    normalise_official,
    official_accuracy,
    robust_accuracy,
)
from llava_ray.errors import DataError


def humans(text: str) -> list[str]:
    """Read "cat*3, dog*7"."""
    return [word for part in text.split(", ") for word in [part.partition("*")[0]] * int(part.partition("*")[2] or 1)]


# prediction, humans, official, llava (None: an error), robust
VECTORS = [
    ("cat", "cat*10", 1, 1, 1),
    ("cat", "cat*3, dog*7", 0.9, 0.9, 0.9),
    ("cat", "cat*2, dog*8", 0.6, 0.6, 0.6),
    ("2", "two*5, 2*5", 1, 1, 1),
    ("2", "two*10", 0, 1, 1),
    ("The cat", "cat*10", 0, 1, 1),
    ("1,000", "1000*9, 1,000", 1, 1, 1),
    ("red,white", "red white*9, x", 1, 0, 1),
    ("0.5", ".5*9, x", 0, 0, 0),
    ("", "a*9, b", 1, 1, 0),
    ("", "a*10", 0, 1, 0),
    ("cat", "cat*2, dog", 4 / 9, None, 4 / 9),
    ("Yes", "yes*10", 0, 1, 1),
    ("cat", "cat*4, dog*6", 1, 1, 1),
    ("cat", "cat, dog*9", 0.3, 0.3, 0.3),
    ("cat", "dog*10", 0, 0, 0),
    ("cat", "cat", 0, None, 1),
]


@pytest.mark.parametrize(("said", "others", "official", "llava", "robust"), VECTORS)
def test_soft_accuracy(said: str, others: str, official: float, llava: float | None, robust: float) -> None:
    texts = humans(others)
    question = Question("1", "?", truths=tuple(texts), facts={"answer_ids": list(range(len(texts)))})
    assert grade_by_humans(question, said, "official").score == pytest.approx(official)
    assert grade_by_humans(question, said, "robust").score == pytest.approx(robust)
    if llava is None:
        with pytest.raises(DataError, match="LLaVA's rule takes 10; score with --profile official or robust"):
            grade_by_humans(question, said, "llava")
    else:
        assert grade_by_humans(question, said, "llava").score == pytest.approx(llava)


def test_humans_without_ids_are_one_and_the_same_to_the_official_script() -> None:
    question = Question("1", "?", truths=("cat",) * 10, facts={"answer_ids": [None] * 10})
    scores = [VQAv2().grade(question, "cat", profile).score for profile in ("official", "llava", "robust")]
    assert scores == [0, 1, 1]
    assert official_accuracy("cat", ["cat"] * 10, list(range(10))) == 1
    assert (llava_accuracy("cat", ["cat"] * 10), robust_accuracy("cat", ["cat"] * 10)) == (1, 1)


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("Two", "2"),
        ("The red car.", "red car"),
        ("black/white", "black white"),
        ("black / white", "black white"),
        ("1,000", "1000"),
        ("it's 3.5", "it 's 3.5"),
        ("3.5.", "3.5"),
        ("U.S.A.", "usa"),
        ("dont know", "don't know"),
        ("a", ""),
        ("none", "0"),
        ("Dog's", "dog 's"),
        ("$5.00", "$5.00"),
        ("yes.\nbecause", "yes because"),
        ("  An  apple ", "apple"),
        ("youd've", "you'd've"),
        ("couldn'tve", "couldn't've"),
        ("yall'd've", "y'all'd've"),
        ("somebody'd", "somebodyd"),
        ("oclock", "o'clock"),
        ("." * 33 + "x", ".x"),
    ],
)
def test_evalai_normal_form(text: str, normal: str) -> None:
    assert normalise_evalai(text) == normal


def test_a_comma_between_words_tells_the_normalisers_apart() -> None:
    assert (normalise_evalai("red,white"), normalise_official("red,white")) == ("redwhite", "red white")
    assert normalise_official("red, white") == "red white"
