"""Numbers, near-equal texts, open answers, judges' scores: the reference vectors."""

import pytest

from evals.benchmark import FAILED, Grade, Graded, Question, join_grade
from evals.benchmarks.docvqa import DocVQA
from evals.benchmarks.llava_bench import LLaVABench
from evals.benchmarks.mm_vet import MMVet
from evals.benchmarks.mmbench import MMBench
from evals.matching.numbers import anls, edit_distance, relaxed_accuracy
from evals.matching.open_answers import open_answer_is_right
from llava_ray.replies import parse_first_word, parse_grade, parse_pair, parse_pair_strictly


@pytest.mark.parametrize(
    ("said", "truth", "right"),
    [
        ("105", "100", True),
        ("105.1", "100", False),
        ("95", "100", True),
        ("94.9", "100", False),
        ("0.14", "14%", True),
        ("14", "14%", False),
        ("yes.", "yes", False),
        ("1,000", "1000", False),
        ("0", "0", True),
        ("0.0", "0", False),
        ("2010", "2015", True),
        ("-5", "5", False),
        ("5 million", "5", False),
        ("10.", "10", True),
        ("nan", "5", False),
    ],
)
def test_relaxed_accuracy(said: str, truth: str, right: bool) -> None:
    assert relaxed_accuracy(said, truth) is right


@pytest.mark.parametrize(
    ("said", "truth", "score"),
    [
        ("helo", "hello", 0.8),
        ("abcd", "abxx", 0.5),
        ("abcd", "axxx", 0),
        ("the answer is 42", "42", 0),
        ("  hello   world ", "hello world", 1.0),
        ("$ 1,234", "$1,234", 0.8571),
        ("", "x", 0),
        ("HELLO", "hello", 1),
    ],
)
def test_anls(said: str, truth: str, score: float) -> None:
    assert anls(said, [truth]) == pytest.approx(score, abs=1e-4)
    assert anls(said, ["something else", truth]) >= anls(said, [truth])


def test_anls_of_llava_counts_inner_spaces() -> None:
    question = Question("1", "?", truths=("hello world",))
    assert DocVQA().grade(question, "  hello   world ", "llava").score == pytest.approx(0.8462, abs=1e-4)
    assert edit_distance("kitten", "sitting") == edit_distance("sitting", "kitten") == 3


@pytest.mark.parametrize(
    ("said", "truth", "right"),
    [
        ("The answer is 24.", "24", True),
        ("1,024", "1024", True),
        ("3.141", "3.14", True),
        ("x = 5", "5", True),
        ("$8.5", "8.5", True),
        ("It is 5 or 6", "6", True),
        ("-12", "12", False),
        ("6e3", "6000", True),
        ("It is in Paris, France", "paris", True),
        ("24", "24", True),
    ],
)
def test_open_answers_of_mmmu(said: str, truth: str, right: bool) -> None:
    assert open_answer_is_right(said, [truth]) is right


def circular_rows(said: str, gold: str = "CDAB") -> list[Graded]:
    questions = [
        Question(str(7 + k * 10**6), "?", truths=(g,), options=("a", "b", "c", "d"), group="7")
        for k, g in enumerate(gold)
    ]
    rows = [join_grade(q, MMBench().grade(q, s, "official")) for q, s in zip(questions, said, strict=False)]
    return rows + [join_grade(q, Grade(0, None, "missing")) for q in questions[len(said) :]]


def test_mmb_1_2_and_6() -> None:
    one, two = (MMBench().add_up(circular_rows(said), "official") for said in ("CDAB", "CDAC"))
    assert (one.headline, one.metrics["vanilla"], one.metrics["mean"]) == (100, 100, 100)
    assert (two.headline, two.metrics["vanilla"], two.metrics["mean"]) == (0, 100, 75)
    six = MMBench().add_up(circular_rows("CDA"), "robust")
    assert (six.headline, six.metrics["incomplete"]) == (None, 1)


def test_mmb_4_the_text_of_the_option() -> None:
    rotations = [
        ("teddy bear", "rabbit", "cat", "dog"),
        ("dog", "teddy bear", "rabbit", "cat"),
        ("cat", "dog", "teddy bear", "rabbit"),
        ("rabbit", "cat", "dog", "teddy bear"),
    ]
    for profile in ("official", "robust"):
        rows = [
            join_grade(q, MMBench().grade(q, "cat", profile))
            for k, options in enumerate(rotations)
            for q in [Question(str(7 + k * 10**6), "?", truths=("CDAB"[k],), options=options, group="7")]
        ]
        total = MMBench().add_up(rows, profile)
        assert (total.headline, total.metrics["vanilla"], total.metrics["mean"]) == (100, 100, 100)


def review_rows(pairs: list[tuple[float, float]], failures: int = 0) -> list[Graded]:
    asked = Question("1", "?", truths=("reference",), categories=("conv",))
    good = [join_grade(asked, Grade(b / 10, f"{a} {b}")) for a, b in pairs]
    return good + [join_grade(asked, FAILED)] * failures


def test_lbw_1_3_and_4() -> None:
    bench = LLaVABench()
    one = bench.add_up(review_rows([(8, 7), (9, 6), (10, 8)]), "robust")
    assert one.headline == pytest.approx(77.8, abs=0.05)
    assert one.metrics["reference x 10"] == pytest.approx(90)
    assert one.metrics["answer x 10"] == pytest.approx(70)
    assert bench.add_up(review_rows([], 3), "llava").headline == pytest.approx(100)
    assert bench.add_up(review_rows([], 3), "robust").headline is None
    assert bench.add_up(review_rows([(8, 4), (8, 4)], 2), "llava").headline == pytest.approx(42.9, abs=0.05)
    assert bench.add_up(review_rows([(8, 4), (8, 4)], 2), "robust").headline == pytest.approx(50)


@pytest.mark.parametrize(
    ("review", "strict", "robust"),
    [
        ("8 7", (8, 7), (8, 7)),
        ("8, 7", None, (8, 7)),
        ("8,7", (8, 7), (8, 7)),
        ("8 7 ", None, (8, 7)),
        ("8.5 9", (8.5, 9), (8.5, 9)),
        ("8/10 7/10", None, (8, 7)),
        ("Assistant 1: 8\nAssistant 2: 7", None, (8, 7)),
        ("**8 7**", None, (8, 7)),
        ("Scores: 8 7", None, (8, 7)),
        ("\n8 7", None, (8, 7)),
        ("Assistant 1: 8, Assistant 2: 7\nBoth", None, (8, 7)),
        ("0 7", (0, 7), None),
    ],
)
def test_first_lines_of_reviews(
    review: str, strict: tuple[float, float] | None, robust: tuple[float, float] | None
) -> None:
    assert parse_pair_strictly(review) == strict
    assert parse_pair(review) == robust


def test_mmv_1() -> None:
    scores = {"1": (1.0, ("rec", "ocr")), "2": (0.5, ("rec",)), "3": (0.0, ("math", "ocr"))}
    rows = [Graded(name, value, f"{value}", "scored", "", abilities) for name, (value, abilities) in scores.items()]
    total = MMVet().add_up(rows, "official")
    found = {name: figure.value for name, figure in total.categories.items()}
    assert (total.headline, found) == (50, {"rec": 75, "ocr": 50, "math": 0})
    assert (parse_first_word("0.5 as"), parse_first_word("1.5"), parse_first_word("")) == (0.5, None, None)
    assert (parse_grade("score: 0.5"), parse_grade("0.5 or 0.6"), parse_grade("7")) == (0.5, None, None)
