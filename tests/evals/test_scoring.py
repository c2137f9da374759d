"""Results: gaps counted, headlines withheld, intervals that say something."""

from pathlib import Path

import pytest

from evals.answers import Answer, RecordedJudge, match_answers, read_answers, read_reviews
from evals.benchmark import Question
from evals.benchmarks.custom import Custom
from evals.benchmarks.llava_bench import LLaVABench
from evals.scoring import score_answers, summarize_result
from evals.tables import flat_metrics, format_headline, format_interval, format_markdown
from llava_ray.errors import DataError


def asked(num: int, *, images: int = 10**6) -> list[Question]:
    return [
        Question(
            f"q{i}",
            "?",
            truths=("yes",),
            categories=("odd" if i % 2 else "even",),
            cluster=f"i{i % images}",
            facts={"rule": "exact"},
        )
        for i in range(num)
    ]


def said(num: int, text: str = "yes") -> list[Answer]:
    return [Answer(f"q{i}", text) for i in range(num)]


def test_the_first_of_several_answers_counts_and_they_are_told() -> None:
    joined = match_answers(asked(2), [*said(2), Answer("q0", "no"), Answer("q1", "yes"), Answer("q9", "yes")])
    assert joined.answers == {"q0": "yes", "q1": "yes"}
    assert (joined.duplicate, joined.conflicting, joined.extra, joined.missing) == (("q0", "q1"), ("q0",), ("q9",), ())


def test_two_questions_of_one_id_are_damage() -> None:
    with pytest.raises(DataError, match="two questions have the id 'q0'"):
        match_answers([*asked(1), *asked(1)], [])


def test_all_right_is_not_certain() -> None:
    found = summarize_result(score_answers(Custom(), asked(10), said(10), "robust"))
    assert found["score"] == 100
    assert found["confidence_interval"] == pytest.approx([72.25, 100], abs=0.01)
    assert found["categories"]["odd"]["confidence_interval"] == pytest.approx([56.55, 100], abs=0.01)
    assert format_interval(found) == "72.25 to 100.00"


def test_questions_about_one_image_are_one_cluster() -> None:
    answers = [Answer(f"q{i}", "yes" if i % 2 else "no") for i in range(20)]
    wide, narrow = (summarize_result(score_answers(Custom(), asked(20, images=n), answers, "robust")) for n in (2, 20))
    assert (wide["num_clusters"], narrow["num_clusters"]) == (2, 20)
    assert wide["standard_error"] > 2 * narrow["standard_error"]


def test_an_unparsed_answer_is_wrong_and_counted_apart() -> None:
    found = summarize_result(score_answers(Custom(), asked(4), [*said(3), Answer("q3", " ")], "robust"))
    assert (found["score"], found["unparsed"], found["missing"], found["ids"]["unparsed"]) == (75, 1, 0, ["q3"])


def test_failed_reviews_are_left_out_and_withhold_the_headline() -> None:
    questions = [
        Question(str(i), "?", (), ("reference",), (), ("conv",), cluster=str(i), facts={"context": "c"})
        for i in range(100)
    ]
    answers = [Answer(str(i), "x") for i in range(100)]
    for failures, shown in ((2, 87.5), (3, None)):
        judge = RecordedJudge({str(i): "8 7\nfine" for i in range(failures, 100)})
        found = summarize_result(score_answers(LLaVABench(), questions, answers, "robust", judge))
        assert (found["score"], found["failed"], found["num_scored"]) == (shown, failures, 100 - failures)
        assert found["computed_score"] == 87.5
    assert format_headline(found) == "withheld"
    assert "3 of 100 questions have no score" in format_markdown([found])
    assert "llava_bench/robust/score" not in flat_metrics(found)


def test_nothing_to_score_is_an_error() -> None:
    with pytest.raises(DataError, match="hold no questions"):
        score_answers(Custom(), [], [], "robust")
    with pytest.raises(DataError, match="only its server scores them"):
        score_answers(Custom(), [Question("1", "?")], [], "robust")


def test_answers_files_of_every_form(tmp_path: Path) -> None:
    forms = {
        "a.jsonl": '{"question_id": 1, "text": "x\u2028y", "prompt": "p"}\n\n{"question_id": "2", "text": null}\n',
        "b.json": '[{"questionId": 1, "answer": "x\u2028y"}, {"id": 2, "prediction": ""}]',
        "c.json": '{"1": "x\u2028y", "2": ""}',
        "d.jsonl": '[{"image": "1", "answer": "x\u2028y"}, {"question_id": 2, "text": ""}]',
    }
    for name, content in forms.items():
        (tmp_path / name).write_text(content, encoding="utf-8")
        assert [(answer.id, answer.text) for answer in read_answers(tmp_path / name)] == [("1", "x\u2028y"), ("2", "")]
    with pytest.raises(DataError, match="there is no answers file"):
        read_answers(tmp_path / "none.jsonl")
    (tmp_path / "r.jsonl").write_text('{"question_id": 1, "tuple": [8, 7]}\n')
    with pytest.raises(DataError, match="lacks question_id or content"):
        read_reviews(tmp_path / "r.jsonl")


def test_bars_and_newlines_do_not_break_a_table() -> None:
    found = summarize_result(score_answers(Custom(), asked(2), said(2), "robust", provenance={"prompt": "a | b\nc"}))
    assert "| prompt | a \\| b c |" in format_markdown([found])
