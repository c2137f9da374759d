"""Benchmarks whose judges reply in a form of their own: asked by a review, scored with its replies."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from benchmark_files import write_benchmark
from review_files import write_lines
from scripted_judge import Remote, scripted_judge

from llava_ray.config.recipes import load_settings
from llava_ray.config.review import ReviewConfig
from llava_ray.review.calls import CallPlan, list_judges
from llava_ray.review.verdict import read_verdict
from pipelines.evaluate import main as evaluate
from pipelines.review import main
from pipelines.review_inputs import choose_rubric, read_inputs
from pipelines.review_run import Outcome


@pytest.fixture(scope="module")
def judge() -> Iterator[Remote]:
    with scripted_judge() as remote:
        yield remote


def put(name: str, folder: Path) -> list[str]:
    """Write a benchmark and an answer to each question; return the flags that name them."""
    data = write_benchmark(name, folder / name)
    ids = range(3) if name == "mmhal_bench" else (9, 25, 30)
    answers = write_lines(folder / "answers.jsonl", [{"question_id": n, "text": f"It shows number {n}."} for n in ids])
    return ["--benchmark", name, "--data", str(data), "--answers", str(answers)]


@pytest.mark.parametrize(
    ("name", "prompt"),
    [
        ("mmhal_bench", "Rate.\nFire hydrant|What colour is number 0?|Number 0 is yellow.|It shows number 0.\n"),
        ("object_halbench", "[Question]\nPlease describe the image.\n\n[Answer]\nIt shows number 9.\n"),
    ],
)
def test_the_judge_is_asked_in_the_benchmarks_words_without_a_role(tmp_path: Path, name: str, prompt: str) -> None:
    config = load_settings(ReviewConfig, [*put(name, tmp_path), "--judge.model", "m"])
    inputs, rubric = read_inputs(config.review), choose_rubric(config.review)
    plan = CallPlan(inputs.items, rubric, list_judges(config.judge), both_orders=True, samples=1)
    assert len(plan) == 3
    (message,) = plan[0].body["messages"]
    assert message["role"] == "user"
    assert message["content"].endswith(prompt)


@pytest.mark.parametrize("mode", ["pairwise", "single"])
def test_other_modes_ask_our_own_rubric(tmp_path: Path, mode: str) -> None:
    flags = put("mmhal_bench", tmp_path)
    other = write_lines(tmp_path / "b.jsonl", [{"question_id": 0, "text": "Red."}])
    more = [str(other)] if mode == "pairwise" else []
    config = load_settings(ReviewConfig, [*flags, *more, "--judge.model", "m", "--review.mode", mode])
    item = read_inputs(config.review).items[0]
    assert (choose_rubric(config.review).kind, item.request) == ("pair" if mode == "pairwise" else "single", None)
    assert item.context == {"caption": ["In the image: Fire hydrant\nAnswer by a human: Number 0 is yellow."]}


def test_verdicts_are_ratings_and_numbers_of_objects() -> None:
    rating = read_verdict("Fine.\n**Rating: 4**", "rating", as_json=False)
    assert rating is not None
    assert (rating.scores, rating.explanation) == ((4.0,), "Fine.\n**Rating: 4**")
    objects = read_verdict('["dog", "cat"]', "objects", as_json=False)
    assert objects is not None
    assert objects.scores == (2.0,)
    assert read_verdict("4", "rating", as_json=False) is None
    assert read_verdict("A dog.", "objects", as_json=False) is None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "said", "reviewed", "scored"),
    [
        ("mmhal_bench", "The hydrant is red.\nRating: 5, very informative", 5.0, 5.0),
        ("object_halbench", '["dog", "cat", "sky"]', 3.0, 0.0),
    ],
)
def test_judged_hallucination_is_scored_with_the_reviews(
    judge: Remote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, said: str, reviewed: float, scored: float
) -> None:
    monkeypatch.setattr("pipelines.review_report._keep", lambda *given: None)  # a database of MLflow takes seconds
    judge.play(content=said)
    about = put(name, tmp_path)
    whose = ("--judge.model", "scripted", "--judge.base_url", judge.base_url)
    outcome = main(
        [*about, *whose, "--judge.delivery", "batch", "--judge.batch_poll_s", "0.05", "--output", str(tmp_path / "out")]
    )
    assert isinstance(outcome, Outcome)
    (found,) = outcome.report["results"]
    assert (found["score"], found["done"], outcome.complete) == (reviewed, 3, True)
    (reviews,) = (tmp_path / "out").glob("review_*.jsonl")
    assert {json.loads(line)["content"] for line in reviews.read_text().splitlines()} == {said}
    evaluate(["score", *about, "--reviews", str(reviews), "--output", str(tmp_path / "scored")])
    result = json.loads((tmp_path / "scored" / "result.json").read_text())
    assert (result["score"], result["num_scored"], result["failed"]) == (scored, 3, 0)
