"""BLINK: letters as the authors' scripts find them, a judge for the rest, a mean over tasks."""

import json
from pathlib import Path

import pytest
from benchmark_files import blink_row, parquet, write_benchmark

from evals.answers import Answer, RecordedJudge
from evals.benchmark import Grade, Question
from evals.benchmarks.blink import Blink, parse_blink
from evals.scoring import score_answers, summarize_result
from llava_ray.errors import DataError

POINTS = ("point one", "point two", "point three", "point four")
QUESTION = Question("val_Relative_Depth_1", "?", truths=("B",), options=POINTS, facts={"question": "Which point?"})
REFUSAL = "I'm sorry, but I can't assist with that."


@pytest.mark.parametrize(
    ("answer", "num_options", "letter"),
    [
        ("A", 2, "A"),
        ("(B)", 2, "B"),
        ("E", 2, "E"),  # a letter alone is taken, whatever the options
        ("B.", 2, None),
        ("b", 2, None),
        ("(B) point two", 2, "B"),
        ("The answer is (B).", 2, None),
        ("(A) is near, (B) is far.", 2, None),
        ("(A) is near, (B) is far.\n\nSo it is (A)", 2, "A"),
        ("It is (A)\n\nas said.", 2, "A"),
        ("(A) or\n\n(A) or (B)", 2, None),
        ("(C) it is", 2, None),
        (REFUSAL, 4, None),
    ],
)
def test_the_authors_rule(answer: str, num_options: int, letter: str | None) -> None:
    assert parse_blink(answer, num_options) == letter


@pytest.mark.parametrize(
    ("reply", "grade"),
    [
        ("(B)", Grade(1.0, "B")),
        (" (C)\n", Grade(0.0, "C")),
        ("(Z)", Grade(0.0, None, "unparsed")),
        ("(Z) Failed", Grade(0.0, None, "unparsed")),
        ("B", Grade(0.0, None, "failed")),
        ("(E)", Grade(0.0, None, "failed")),
        ("The answer is (B)", Grade(0.0, None, "failed")),
        ("", Grade(0.0, None, "failed")),
        (None, Grade(0.0, None, "failed")),
    ],
)
def test_a_judge_reads_what_the_rule_does_not(reply: str | None, grade: Grade) -> None:
    judge = RecordedJudge({} if reply is None else {QUESTION.id: reply})
    assert Blink().grade(QUESTION, "Point two, where the child sits.", "official", judge) == grade
    assert Blink().grade(QUESTION, "(A)", "official", judge) == Grade(0.0, "A")


def test_without_reviews_no_official_figure_of_answers_in_words() -> None:
    with pytest.raises(DataError, match="such as that to 'val_Relative_Depth_1': use --reviews FILE or"):
        Blink().grade(QUESTION, REFUSAL, "official")
    assert Blink().grade(QUESTION, "", "official").state == "unparsed"
    assert Blink().grade(QUESTION, REFUSAL, "robust").state == "unparsed"


def test_the_score_is_the_mean_of_tasks(tmp_path: Path) -> None:
    questions = Blink().read(write_benchmark("blink", tmp_path))
    assert [len(question.images) for question in questions] == [4, 1, 1]
    assert questions[0].categories == ("Multi-view_Reasoning",)
    answers = [Answer(question.id, "(A)") for question in questions]
    found = summarize_result(score_answers(Blink(), questions, answers, "official"))
    assert found["score"] == 25  # of 0 and 50, not one of three
    assert found["figures"] == {"micro accuracy": 33.3333, "tasks": 2}
    assert found["categories"]["Relative_Depth"]["score"] == 50
    assert found["whole_set"] == 1_901


def test_predictions_are_the_servers(tmp_path: Path) -> None:
    folder = write_benchmark("blink", tmp_path)
    for file in folder.glob("*/val-*.parquet"):
        file.unlink()
    benchmark = Blink()
    questions = benchmark.read(folder)
    assert not any(question.truths for question in questions)
    said = {"test_Relative_Depth_1": "B", "test_Relative_Depth_2": "point two"}
    files = benchmark.submit(questions, said)
    assert json.loads(files["blink_test_predictions.json"]) == {
        "test_Multi-view_Reasoning_1": "(Z)",
        "test_Relative_Depth_1": "(B)",
        "test_Relative_Depth_2": "(B)",
    }
    (request,) = map(json.loads, files["judge_requests.jsonl"].decode().splitlines())
    assert request["question_id"] == "test_Relative_Depth_2"
    assert "(A) point one\n(B) point two\nAnswer: point two" in request["request"]


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"idx": "Relative_Depth_1"}, "the id 'Relative_Depth_1' is none of BLINK's"),
        ({"answer": "(D)"}, r"the answer to 'val_Relative_Depth_1' is '\(D\)', none of its 2 options"),
        ({"answer": "A"}, "the answer to 'val_Relative_Depth_1' is 'A', none of its 2 options"),
        ({"choices": []}, "has 0 options; expected 2 to 5"),
        ({"choices": "AB"}, "has 0 options; expected 2 to 5"),
        ({"image_1": None}, "has no image"),
    ],
)
def test_damaged_rows_are_named(tmp_path: Path, change: dict[str, object], fault: str) -> None:
    parquet(tmp_path, "Relative_Depth/val-0.parquet", [blink_row("val_Relative_Depth_1", "(A)", 2, 1) | change])
    with pytest.raises(DataError, match=rf"val-0.parquet: .*{fault}"):
        Blink().read(tmp_path)


def test_a_task_that_is_there_twice_is_named(tmp_path: Path) -> None:
    for name in ("Relative_Depth", "copy"):
        parquet(tmp_path, f"{name}/val-0.parquet", [blink_row("val_Relative_Depth_1", "(A)", 2, 1)])
    with pytest.raises(DataError, match="question 'val_Relative_Depth_1' occurs more than once"):
        Blink().read(tmp_path)
