"""Letters: LLaVA's and the authors' readings on the reference vectors."""

import pytest

from evals.benchmark import Question
from evals.benchmarks.ai2d import AI2D
from evals.benchmarks.realworldqa import RealWorldQA
from evals.benchmarks.science_qa import ScienceQA
from evals.benchmarks.seed_bench import SEEDBench
from evals.matching.letters import parse_letter, parse_mmbench, parse_mmmu, parse_science_qa

ANIMALS = ("teddy bear", "rabbit", "cat", "dog")
LONG = "The correct answer is **B**. Because the ears are long and A is a bear"
REFUSAL = "Sorry, I can't help with images of people yet."


@pytest.mark.parametrize(
    ("text", "llava"),
    [
        ("B", 1),
        ("b", 0),
        ("B. cat", 1),
        ("B.cat", 0),
        ("The answer is B", 0),
        ("(B)", 0),
        ("The answer is B.", 1),
        ("B.", 0),
        ("The answer is A. The answer is B.", 0),
        ("D", 0),
    ],
)
def test_science_qa(text: str, llava: int) -> None:
    question = Question("1", "?", truths=("B",), options=("fish", "rabbit", "cat"))
    assert ScienceQA().grade(question, text, "llava").score == llava


def test_science_qa_beyond_the_options_is_unparsed() -> None:
    question = Question("1", "?", truths=("B",), options=("fish", "rabbit"))
    assert ScienceQA().grade(question, "C", "llava").state == "unparsed"
    assert parse_science_qa("FAILED") is None


@pytest.mark.parametrize(
    ("text", "mmbench", "mmmu", "robust"),
    [
        ("A.", "A", "A", "A"),
        ("(A)", "A", "A", "A"),
        ("a", None, None, "A"),
        ("a cute teddy bear", "A", None, "A"),
        ("A cat", "A", "A", "C"),
        ("B or C", None, "C", None),
        ("A is wrong, B is right", None, "B", None),
        ("**C**", "C", None, "C"),
        ("C) cat", "C", None, "C"),
        (LONG, "B", "A", "B"),
        ("I think the cat is on the mat", "C", "C", "C"),
        (REFUSAL, None, None, None),
    ],
)
def test_options(text: str, mmbench: str | None, mmmu: str | None, robust: str | None) -> None:
    assert parse_mmbench(text, ANIMALS) == mmbench
    assert parse_mmmu(text, ANIMALS) == mmmu
    assert parse_letter(text, ANIMALS) == robust


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("E", None),
        ("I", None),
        ("Answer: D", "D"),
        ("The correct option is (C).", "C"),
        ("my answer would be B because A is too small", "B"),
        ("选项C", "C"),
        ("B、兔子", "B"),
        ("A dog", "D"),
        ("a big dog, not a small one", "D"),
        ("cat and dog", None),
        ("concatenate", None),
        ("B\nB. rabbit", "B"),
        ("", None),
    ],
)
def test_more_robust_letters(text: str, letter: str | None) -> None:
    assert parse_letter(text, ANIMALS) == letter


def test_the_longer_of_two_options_is_meant() -> None:
    assert parse_letter("a red car", ("car", "red car", "blue car")) == "B"


@pytest.mark.parametrize(
    ("text", "llava"), [("A", 1), ("A.", 0), ("a", 0), ("(A)", 0), ("Apple", 0), ("Answer: A", 0), ("", 0)]
)
def test_seed_bench(text: str, llava: int) -> None:
    question = Question("1", "?", truths=("A",), options=("apple", "pear", "plum", "fig"))
    assert SEEDBench().grade(question, text, "llava").score == llava


@pytest.mark.parametrize(
    ("text", "right"),
    [("A", 1), ("A. leaf", 1), ("a", 1), ("(A)", 1), ("A) leaf", 0), ("The answer is A", 0), (" A", 0)],
)
def test_ai2d(text: str, right: int) -> None:
    question = Question("1", "?", truths=("A",), options=("leaf", "root", "stem", "flower"))
    assert AI2D().grade(question, text, "official").score == AI2D().grade(question, text, "llava").score == right


@pytest.mark.parametrize(
    ("text", "truth", "right"),
    [("A. Left", "A", 1), ("(B)", "B", 1), ("b", "B", 0), ("2.", "2", 1), ("two", "2", 0), ("Yes, it is", "yes", 0)],
)
def test_realworldqa(text: str, truth: str, right: int) -> None:
    assert RealWorldQA().grade(Question("1", "?", truths=(truth,)), text, "official").score == right
