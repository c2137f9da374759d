"""MMHal-Bench: ratings by the authors' rule and by ours, figures, the authors' prompt; damaged folders are named."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from benchmark_files import write_benchmark

from evals.answers import Answer, RecordedJudge, read_answers
from evals.benchmark import Graded
from evals.benchmarks.mmhal_bench import MMHalBench, rating_request
from evals.hallucination_replies import (
    parse_object_list,
    parse_object_list_loosely,
    parse_rating,
    parse_rating_loosely,
)
from evals.scoring import score_answers, summarize_result
from llava_ray.errors import DataError


@pytest.mark.parametrize(
    ("reply", "official", "robust"),
    [
        ("Rating: 6", 6, 6),
        ("It is right.\nrating: 3, not informative", 3, 3),
        ("Rating: 0", 0, 0),
        ("Rating: 5. So the rating: 5", 5, 5),
        ("Rating: 60", 6, None),  # the authors look for "rating: 6" anywhere
        ("Rating: 4.5", 4, None),
        ("Rating: 5-6", 5, None),
        ("Rating: 6/10", 6, None),
        ("Rating: 6/6", 6, 6),
        ("Rating: 6, Rating: 2", None, None),
        ("**Rating:** 6", None, 6),
        ("Rating:6", None, 6),
        ("Rating: 7", None, None),
        ("Rating: -1", None, None),
        ("<think>Rating: 1</think>\nRating: 6", None, 6),
        ("<think>Rating: 1", 1, None),
        ("I would give it a 6.", None, None),
        ("", None, None),
    ],
)
def test_ratings(reply: str, official: int | None, robust: int | None) -> None:
    assert (parse_rating(reply), parse_rating_loosely(reply)) == (official, robust)


def test_figures_are_those_of_the_authors_script() -> None:
    # 6, 3, 2 and a reply without a rating, which rates 0: half of them hallucinate, informed 3, 0, 2, 0 of 3.
    rows = [
        Graded(str(n), r / 6, str(r), "scored", "x", (kind,))
        for n, (r, kind) in enumerate([(6, "a"), (3, "b"), (2, "a")])
    ]
    total = MMHalBench().add_up([*rows, Graded("3", 0, None, "unparsed", "x", ("b",))], "official")
    assert total.headline == 2.75
    assert total.metrics == {"hallucination_rate": 50, "informativeness": pytest.approx(500 / 12)}
    assert {name: one.value for name, one in total.categories.items()} == pytest.approx({"a": 4, "b": 1.5})


def test_failures_are_apart_to_us_and_zero_to_the_authors(tmp_path: Path) -> None:
    questions = MMHalBench().read(write_benchmark("mmhal_bench", tmp_path))
    answers = [Answer(question.id, "It is red.") for question in questions]
    judge = RecordedJudge({"0": "Rating: 6", "1": "Rating: 3", "2": "Who knows."})
    robust = summarize_result(score_answers(MMHalBench(), questions, answers, "robust", judge))
    assert (robust["score"], robust["computed_score"], robust["failed"]) == (None, 4.5, 1)
    official = summarize_result(score_answers(MMHalBench(), questions, answers, "official", judge))
    assert (official["score"], official["unparsed"], official["figures"]["hallucination_rate"]) == (3, 1, 33.3333)
    gone = summarize_result(score_answers(MMHalBench(), questions, answers[:2], "official", judge))
    # A missing answer rates 0, but hallucinates nothing.
    assert (gone["computed_score"], gone["missing"], gone["figures"]["hallucination_rate"]) == (3, 1, 0)


def test_the_prompt_is_the_authors_own_where_their_script_is(tmp_path: Path) -> None:
    folder = write_benchmark("mmhal_bench", tmp_path)
    question = MMHalBench().read(folder)[1]
    asked = rating_request(question, "It is {} red.")
    assert asked == "Rate.\nFire hydrant, Tree|What colour is number 1?|Number 1 is yellow.|It is {} red.\n"
    (folder / "eval_gpt4.py").unlink()
    ours = rating_request(MMHalBench().read(folder)[1], "It is red.")
    assert "Rating: N" in ours
    assert all(text in ours for text in ("Fire hydrant, Tree", "Number 1 is yellow.", "It is red."))


def test_answers_and_submission_are_the_authors_response_file(tmp_path: Path) -> None:
    folder = write_benchmark("mmhal_bench", tmp_path)
    questions = MMHalBench().read(folder)
    rows = json.loads(MMHalBench().submit(questions, {"0": "Red."})["mmhal_responses.json"])
    assert [row["model_answer"] for row in rows] == ["Red.", "", ""]
    assert rows[1] == json.loads((folder / "response_template.json").read_text())[1]
    (tmp_path / "responses.json").write_text(json.dumps([row | {"model_answer": "Blue."} for row in rows]))
    judge = RecordedJudge({str(n): "Rating: 5" for n in range(3)})
    answers = read_answers(tmp_path / "responses.json")
    assert score_answers(MMHalBench(), questions, answers, "robust", judge).score == 5


def change(folder: Path, edit: Any) -> None:
    path = folder / "response_template.json"
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


DAMAGE: dict[str, tuple[Any, str]] = {
    "no questions": (lambda f: (f / "response_template.json").unlink(), r"has no response_template.json"),
    "a question without an answer": (lambda f: change(f, lambda c: c[1].pop("gt_answer")), "a row has no 'gt_answer'"),
    "an image twice": (
        lambda f: change(f, lambda c: c[1].update(image_id=c[0]["image_id"])),
        "image_id 'df62a56fdc1bb120' occurs more than once",
    ),
    "contents that are no list": (
        lambda f: change(f, lambda c: c[2].update(image_content="Tree")),
        "image_content of question 2 is no list of texts",
    ),
    "a script without the prompt": (
        lambda f: (f / "eval_gpt4.py").write_text("templates = 1"),
        "eval_gpt4.py assigns no text to 'template'",
    ),
    "a script that is none": (lambda f: (f / "eval_gpt4.py").write_text("(("), "eval_gpt4.py is no Python script"),
    "a prompt of another kind": (
        lambda f: (f / "eval_gpt4.py").write_text("template = '{} {}'"),
        "has 2 places to fill; expected 4",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_folder_is_named_with_a_remedy(tmp_path: Path, name: str) -> None:
    damage, told = DAMAGE[name]
    damage(write_benchmark("mmhal_bench", tmp_path))
    with pytest.raises(DataError, match=told):
        MMHalBench().read(tmp_path)


def test_any_reply_is_read_or_left_out_in_no_time() -> None:
    draw = random.Random(0)
    pieces = [
        "Rating: ",
        "rating",
        "6",
        "[",
        '["dog"',
        "]",
        "</think>",
        "<think>",
        "\ud800",
        "\n",
        "*",
        "9" * 5000,
        "/6",
    ]
    for _ in range(500):
        reply = "".join(draw.choices(pieces, k=draw.randint(0, 12)))
        for rating in (parse_rating(reply), parse_rating_loosely(reply)):
            assert rating is None or 0 <= rating <= 6
        for listed in (parse_object_list(reply), parse_object_list_loosely(reply)):
            assert listed is None or all(isinstance(one, str) for one in listed)
    for reply in ("[" * 99_999, "rating: " * 12_000, "Rating: " + "1" * 90_000):
        assert parse_object_list_loosely(reply) is None
        assert parse_rating_loosely(reply) is None
