"""OCRBench: containment as the authors' script does it, points of five components, three forms of the data."""

import base64
import json
from pathlib import Path

import pytest
from benchmark_files import encoded, parquet, put, write_benchmark

from evals.answers import Answer
from evals.benchmark import Question
from evals.benchmarks.ocrbench import OCRBench
from evals.scoring import score_answers, summarize_result
from llava_ray.errors import DataError

FORMULA = r"\frac { 1 } { x }"


@pytest.mark.parametrize(
    ("answer", "truths", "is_formula", "right"),
    [
        ("CENTRE", ("CENTRE",), False, True),
        ("The word is centre.", ("CENTRE",), False, True),
        ("the centres", ("CENTRE",), False, True),
        ("centr", ("CENTRE",), False, False),
        ("new\nyork", ("New York",), False, True),
        ("NewYork", ("New York",), False, False),
        ("1985", ("85",), False, True),
        ("it costs $12.50", ("twelve", "$12.50"), False, True),
        (r"\frac{1}{x}", (FORMULA,), True, True),
        (r"$ \frac {1} {x} $", (FORMULA,), True, True),
        ("\\frac{1}\n{x}", (FORMULA,), True, True),
        (r"\frac{1}{X}", (FORMULA,), True, False),
        (r"\frac{1}{x}", (FORMULA,), False, False),
        ("ABC", ("abc",), True, False),
    ],
)
def test_the_authors_rule(answer: str, truths: tuple[str, ...], is_formula: bool, right: bool) -> None:
    question = Question("0", "?", truths=truths, facts={"is_formula": is_formula})
    for profile in ("llava", "official"):
        assert OCRBench().grade(question, answer, profile).score == right


def test_robust_formulas_have_no_spaces_and_no_dollars() -> None:
    question = Question("0", "?", truths=(FORMULA,), facts={"is_formula": True})
    for text in (r"$$\frac{1}{x}$$", r"\( \frac{1} {x} \)", "The formula is $\\frac{1}\\,{x}$."):
        assert OCRBench().grade(question, text, "robust").score == 1
    assert OCRBench().grade(question, r"\frac{2}{x}", "robust").score == 0


def test_points_are_counted_by_component(tmp_path: Path) -> None:
    questions = OCRBench().read(write_benchmark("ocrbench", tmp_path))
    answers = [Answer("0", "centre"), Answer("1", "over"), Answer("docVQA/292", "$12.50"), Answer("3", r"\frac{1}{x}")]
    found = summarize_result(score_answers(OCRBench(), questions, answers, "official"))
    assert (found["score"], found["figures"]["accuracy"], found["extra"]) == (3, 75, 0)
    assert found["figures"]["Text Recognition"] == 1
    assert found["figures"]["Doc-oriented VQA"] == 1
    assert found["figures"]["Key Information Extraction"] is None
    assert found["categories"]["Regular Text Recognition"]["score"] == 50
    assert found["categories"]["svt"] == found["categories"]["svt"] | {"score": 0, "num": 1}
    ends = found["confidence_interval"]
    assert 0 <= ends[0] < 3 < ends[1] <= 1000


def test_all_thousand_points(tmp_path: Path) -> None:
    row = {"dataset_name": "svt", "id": 1, "image_path": "a.jpg", "question": "?", "answers": "under"}
    put(tmp_path, "OCRBench.json", [row | {"type": "Regular Text Recognition"}] * 1000)
    questions = OCRBench().read(tmp_path)
    answers = [Answer(str(n), "under" if n < 998 else "over") for n in range(1000)]
    found = summarize_result(score_answers(OCRBench(), questions, answers, "official"))
    assert (found["score"], found["whole_set"]) == (998, 1000)


def test_the_tables_of_others_are_the_same(tmp_path: Path) -> None:
    kinds = ("Regular Text Recognition", "Handwritten Mathematical Expression Recognition")
    truths = (["CENTRE", "12.50"], [FORMULA])
    rows = [
        {"dataset": ("IIIT5K", "HME100k")[n], "question": "?", "question_type": kinds[n], "answer": truths[n]}
        | {"image": {"bytes": encoded(n), "path": None}}
        for n in range(2)
    ]
    parquet(tmp_path / "hub", "data/test-00000-of-00001.parquet", rows)
    cells = [[str(n), base64.b64encode(encoded(n)).decode(), "?", str(truths[n]), kinds[n]] for n in range(2)]
    lines = [["index", "image", "question", "answer", "category"], *cells]
    put(tmp_path / "kit", "OCRBench.tsv", "".join("\t".join(line) + "\n" for line in lines))
    for form in ("hub", "kit"):
        first, second = OCRBench().read(tmp_path / form)
        assert (first.id, first.truths, first.categories[0]) == ("0", ("CENTRE", "12.50"), kinds[0])
        assert OCRBench().grade(second, r"\frac{1}{x}", "official").score == 1
        assert isinstance(first.images[0], bytes)


def test_the_result_file_has_predictions_and_results(tmp_path: Path) -> None:
    questions = OCRBench().read(write_benchmark("ocrbench", tmp_path))
    rows = json.loads(OCRBench().submit(questions, {"0": "centre"})["OCRBench_result.json"])
    assert [(row["predict"], row["result"]) for row in rows] == [("centre", 1), ("", 0), ("", 0), ("", 0)]
    assert rows[0]["image_path"] == "IIIT5K/test/918_1.png"
    assert "image" not in rows[0]


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"type": "Song Recognition"}, "row 0 is of the type 'Song Recognition', none of OCRBench's"),
        ({"answers": []}, "row 0 has no right answer"),
        ({"answers": ""}, "row 0 has no right answer"),
        ({"answers": None}, "row 0 has no right answer"),
        ({"answers": 12.5}, "row 0 has no right answer"),
        ({"answers": ["under", 7]}, "row 0 has no right answer"),
        ({"question": None}, "'question' of question '0' is None; expected a text"),
    ],
)
def test_damaged_rows_are_named(tmp_path: Path, change: dict[str, object], fault: str) -> None:
    row = {"dataset_name": "svt", "id": 1, "image_path": "a.jpg", "question": "?", "answers": "under"}
    put(tmp_path, "OCRBench.json", [row | {"type": "Regular Text Recognition"} | change])
    with pytest.raises(DataError, match=rf"OCRBench.json: {fault}"):
        OCRBench().read(tmp_path)


def test_a_file_of_another_form_is_named(tmp_path: Path) -> None:
    put(tmp_path, "OCRBench.json", {"a": 1})
    with pytest.raises(DataError, match=r"OCRBench.json holds no list of questions"):
        OCRBench().read(tmp_path)
    put(tmp_path, "OCRBench.json", [7])
    with pytest.raises(DataError, match=r"OCRBench.json: a row has no 'image_path'"):
        OCRBench().read(tmp_path)
