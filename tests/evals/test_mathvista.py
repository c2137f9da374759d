"""MathVista: extraction and normalisation as the authors' scripts do them, and a judge's extractions."""

import json
from pathlib import Path
from typing import Any

import pytest
from benchmark_files import encoded, mathvista_row, parquet, put, write_benchmark

from evals.answers import Answer, RecordedJudge
from evals.benchmark import Grade, Question
from evals.benchmarks.mathvista import MathVista
from evals.benchmarks.mathvista_files import read_problems
from evals.matching.math_answers import extract_plainly, extract_quickly, normalise_extraction, parse_list, parse_number
from evals.scoring import score_answers, summarize_result
from llava_ray.errors import DataError

ANGLES = ("135°", "140°", "145°", "150°")


@pytest.mark.parametrize(
    ("answer", "kind", "choices", "extraction"),
    [
        ("145°", "text", ANGLES, "145°"),
        ("C", "text", ANGLES, None),
        ("(C) 145°", "text", ANGLES, None),
        ("145° ", "text", ANGLES, None),
        ("E", "text", ("A", "B", "C", "D", "E"), "E"),
        ("14", "integer", (), "14"),
        (" 14 ", "integer", (), "14"),
        ("14.0", "integer", (), None),
        ("The number missing is 14.", "integer", (), None),
        ("0.6", "float", (), "0.6"),
        ("6", "float", (), "6.0"),
        ("1e3", "float", (), "1000.0"),
        ("$1.45", "float", (), None),
        ("[1, 2]", "list", (), None),
    ],
)
def test_what_needs_no_judge(answer: str, kind: str, choices: tuple[str, ...], extraction: str | None) -> None:
    assert extract_plainly(answer, kind, choices) == extraction


def test_the_quick_rule() -> None:
    assert extract_quickly('I see. The answer is "145°". Good.') == "145°"
    assert extract_quickly('The answer is "145°"') is None
    assert extract_quickly("The answer is 145°.") is None


@pytest.mark.parametrize(
    ("extraction", "kind", "choices", "precision", "normal"),
    [
        ("C", "text", ANGLES, 0, "145°"),
        ("(c) 145°", "text", ANGLES, 0, "145°"),
        ("The answer is (B).", "text", ANGLES, 0, "140°"),
        ("c", "text", ANGLES, 0, "135°"),  # no letter of theirs: the nearest text, all as far as each other
        ("145", "text", ANGLES, 0, "145°"),
        ("yes.", "text", ("Yes", "No"), 0, "Yes"),
        ("E", "text", ("Yes", "No"), 0, "No"),
        ("14", "integer", (), 0, "14"),
        ("14.9", "integer", (), 0, "14"),
        ("-3.7", "integer", (), 0, "-3"),
        ("1,000", "integer", (), 0, None),
        ("inf", "integer", (), 0, None),
        ("fourteen", "integer", (), 0, None),
        ("1.26", "float", (), 1, "1.3"),
        ("1.25", "float", (), 1, "1.2"),
        ("2", "float", (), 2, "2.0"),
        ("0.6", "float", (), 2, "0.6"),
        ("60%", "float", (), 1, None),
        ("[2007, 2008]", "list", (), 0, "[2007, 2008]"),
    ],
)
def test_normalisation(
    extraction: str, kind: str, choices: tuple[str, ...], precision: int, normal: str | None
) -> None:
    assert normalise_extraction(extraction, kind, choices, precision) == normal


def official(question: Question, answer: str, reply: str | None = None) -> Grade:
    return MathVista().grade(question, answer, "official", RecordedJudge({} if reply is None else {question.id: reply}))


@pytest.fixture
def questions(tmp_path: Path) -> dict[str, Question]:
    return {question.id: question for question in read_problems(write_benchmark("mathvista", tmp_path))}


def test_a_judge_extracts_what_the_rule_does_not(questions: dict[str, Question]) -> None:
    said = "Let us see. The angle must be the third one."
    assert official(questions["3"], said, "C") == Grade(1.0, "145°")
    assert official(questions["3"], said, "D") == Grade(0.0, "150°")
    assert official(questions["3"], "145°", "D") == Grade(1.0, "145°")  # not asked
    assert official(questions["2"], "It is 1000 g.", "1000") == Grade(1.0, "1000")
    assert official(questions["1"], "About 1.23 m", "1.23") == Grade(1.0, "1.2")
    assert official(questions["4"], "From 2007 to 2008", "[2007, 2008]\n").score == 1
    assert official(questions["4"], "From 2007 to 2008", "[2007,2008]").score == 0  # texts have to be equal


def test_failures_are_a_state_of_their_own(questions: dict[str, Question]) -> None:
    for reply in (None, "", " \n", "x" * 5_000):
        assert official(questions["2"], "It is 1000 g.", reply).state == "failed"
    assert official(questions["2"], "It is 1000 g.", "a thousand").state == "unparsed"
    assert official(questions["3"], "").state == "unparsed"  # the authors take the shortest choice


def test_without_reviews_no_official_figure_of_answers_in_words(questions: dict[str, Question]) -> None:
    benchmark = MathVista()
    assert benchmark.grade(questions["3"], 'The answer is "145°".', "official").score == 1
    for profile in ("llava", "official"):
        with pytest.raises(DataError, match="such as that to '3': use --reviews FILE or --profile robust"):
            benchmark.grade(questions["3"], "(C)", profile)
    assert benchmark.grade(questions["3"], "(C)", "robust").score == 1


def test_categories_are_all_that_the_authors_report(questions: dict[str, Question]) -> None:
    answers = [Answer("1", "1.2"), Answer("2", "999"), Answer("3", "145°"), Answer("4", "[2007, 2008]")]
    found = summarize_result(score_answers(MathVista(), list(questions.values()), answers, "robust"))
    assert found["score"] == 75
    scores = {name: (one["score"], one["num"]) for name, one in found["categories"].items()}
    assert scores["skill: algebraic reasoning"] == (75, 4)
    assert scores["answer type: integer"] == (0, 1)
    assert scores["task: geometry problem solving"] == (75, 4)
    assert scores["question type: multi_choice"] == (100, 1)


def test_prompts_are_the_authors(questions: dict[str, Question]) -> None:
    assert questions["3"].prompt == (
        "Hint: Please answer the question and provide the correct option letter, e.g., A, B, C, D, at the end.\n"
        "Question: Which angle?\nChoices:\n(A) 135°\n(B) 140°\n(C) 145°\n(D) 150°"
    )
    assert questions["1"].prompt == (
        "Hint: Please answer the question requiring a floating-point number with one decimal place and provide the "
        "final value, e.g., 1.2, 1.3, 1.4, at the end.\nQuestion: How far? (Unit: cm)"
    )


def test_their_file_of_queries_comes_first_and_has_to_be_whole(tmp_path: Path) -> None:
    folder = write_benchmark("mathvista", tmp_path)
    put(folder, "query.json", {str(n): f"Query {n}" for n in range(1, 9)})
    assert [question.prompt for question in read_problems(folder)] == [f"Query {n}" for n in range(1, 5)]
    put(folder, "query.json", {"1": "Query 1"})
    with pytest.raises(DataError, match=r"query.json has no query for 3 of 4 questions: 2, 3, 4; add it, or leave"):
        read_problems(folder)


def test_the_hubs_parquet_is_the_same(tmp_path: Path) -> None:
    row = mathvista_row("3", "Which angle?", "145°", "text", choices=list(ANGLES), query="Their query")
    parquet(
        tmp_path, "data/testmini-00000-of-00001.parquet", [row | {"decoded_image": {"bytes": encoded(1), "path": ""}}]
    )
    (question,) = read_problems(tmp_path)
    assert (question.prompt, question.truths, question.options) == ("Their query", ("C",), ANGLES)
    assert isinstance(question.images[0], bytes)


def test_the_output_is_what_the_authors_scripts_take(tmp_path: Path) -> None:
    questions = read_problems(write_benchmark("mathvista", tmp_path))
    files = MathVista().submit(questions, {"1": "1.2", "3": "(C) 145°"})
    output: dict[str, Any] = json.loads(files["output_testmini.json"])
    assert list(output) == ["1", "2", "3", "4"]
    assert output["3"]["response"] == "(C) 145°"
    assert output["3"]["query"] == questions[2].prompt
    assert output["3"].keys() >= {"choices", "question_type", "answer_type", "precision", "metadata", "pid", "answer"}
    assert json.loads(files["output_testmini_response_only.json"]) == {"1": "1.2", "2": "", "3": "(C) 145°", "4": ""}
    (request,) = files["judge_requests.jsonl"].decode().splitlines()
    assert json.loads(request)["question_id"] == "3"
    assert "Model response: (C) 145°" in json.loads(request)["request"]


def test_the_test_split_has_no_answers_and_is_submitted(tmp_path: Path) -> None:
    row = mathvista_row("1001", "How many?", "", "integer")
    put(tmp_path, "test.json", {"1001": row})
    questions = read_problems(tmp_path)
    assert questions[0].truths == ()
    with pytest.raises(DataError, match="only its server scores them"):
        score_answers(MathVista(), questions, [Answer("1001", "2")], "robust")
    assert json.loads(MathVista().submit(questions, {"1001": "2"})["output_test_response_only.json"]) == {"1001": "2"}


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"choices": None, "question_type": "multi_choice", "answer_type": "text"}, "the choices None"),
        ({"choices": "ab", "question_type": "multi_choice", "answer_type": "text"}, "the choices 'ab'"),
        ({"question_type": "multi_choice"}, "the question type 'multi_choice' with the answer type 'integer'"),
        ({"answer_type": "fraction"}, "with the answer type 'fraction'"),
        ({"answer_type": "float", "precision": None}, "the precision None"),
        ({"answer_type": "float", "precision": "one"}, "the precision 'one'"),
        ({"metadata": None}, "the metadata None"),
        ({"metadata": {"skills": "algebraic"}}, "the metadata"),
        ({"answer": "many"}, "the answer to problem '2' is 'many', no integer"),
        ({"answer": "nan", "answer_type": "float", "precision": 1}, "the answer to problem '2' is 'nan', no float"),
        ({"answer": "7", "choices": ["6", "8"], "question_type": "multi_choice", "answer_type": "text"}, "none of its"),
        ({"pid": "7"}, "the problem '2' has the pid '7'"),
    ],
)
def test_damaged_problems_are_named(tmp_path: Path, change: dict[str, Any], fault: str) -> None:
    put(tmp_path, "testmini.json", {"2": mathvista_row("2", "How many?", "1000", "integer") | change})
    with pytest.raises(DataError, match=rf"testmini.json: .*{fault}"):
        read_problems(tmp_path)


def test_numbers_and_lists_are_read_without_guessing() -> None:
    assert parse_number("So 3 + 4 = 7") == 7
    assert parse_number("between 3 and 4") is None
    assert parse_number("nan") is None
    assert parse_list("first [1, 2], then [1.0, 2]") == [1, 2]
    assert parse_list("[1, 2] or [2, 1]") is None
    assert parse_list("['a']") is None
    assert parse_list("[" + "1," * 9_000 + "]") is None
