"""Files that are joined to questions: no row of them is lost without a word, and each fault names its file."""

import json
from pathlib import Path
from typing import Any

import pytest
from benchmark_files import write_benchmark

from evals.answers import read_reviews
from evals.catalogue import make_benchmark
from llava_ray.errors import DataError

FOUND = {
    "answers_gpt4.jsonl": [{"question_id": 0, "text": "another one"}],
    "context.jsonl": [{"image": "000.jpg", "caption": "another one"}],
    "questions.jsonl": [{"question_id": 0, "image": "000.jpg", "category": "conv", "text": "What?"}],
}


def told(folder: Path, name: str, rows: list[Any]) -> str:
    """What is said of LLaVA-Bench's files with rows added to one of them."""
    path = write_benchmark("llava_bench", folder) / name
    path.write_text(path.read_text() + "".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError) as refused:
        make_benchmark("llava_bench").read(folder)
    return str(refused.value)


@pytest.mark.parametrize("name", FOUND)
def test_two_rows_that_differ_are_refused_by_id(tmp_path: Path, name: str) -> None:
    said = told(tmp_path, name, FOUND[name])
    assert name in said
    assert "'0'" in said or "'000.jpg'" in said
    assert "keep one of each" in said


@pytest.mark.parametrize("name", ["answers_gpt4.jsonl", "context.jsonl"])
def test_the_same_row_twice_means_one_thing(tmp_path: Path, name: str) -> None:
    path = write_benchmark("llava_bench", tmp_path) / name
    before = make_benchmark("llava_bench").read(tmp_path)
    path.write_text(path.read_text() * 2)
    assert make_benchmark("llava_bench").read(tmp_path) == before


@pytest.mark.parametrize(
    "row", [[], 7, None, "x", {}, {"question_id": 9}, {"image": "9"}, {"text": 5, "question_id": 9}]
)
@pytest.mark.parametrize("name", FOUND)
def test_a_row_that_is_none_is_named(tmp_path: Path, name: str, row: Any) -> None:
    said = told(tmp_path, name, [row])
    assert name in said
    assert "a row has no" in said or "is no text" in said


@pytest.mark.parametrize("caption", [5, None, [1], {"a": 1}])
def test_a_caption_that_is_no_text_is_named(tmp_path: Path, caption: Any) -> None:
    assert "caption of 'x'" in told(tmp_path, "context.jsonl", [{"image": "x", "caption": caption}])


def test_two_reviews_of_a_question_are_refused_where_they_differ(tmp_path: Path) -> None:
    path = tmp_path / "reviews.jsonl"
    rows = [{"question_id": 1, "content": "8 9"}, {"question_id": "1", "content": "8 9"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_reviews(path).replies == {"1": "8 9"}
    path.write_text(path.read_text() + json.dumps({"question_id": 1, "content": "7 9"}) + "\n")
    with pytest.raises(DataError, match=r"reviews.jsonl has different reviews of '1'; keep one of each"):
        read_reviews(path)


FIELDS = {
    "mm_vet": ("mm-vet.json", ("answer", "capability", "question", "imagename")),
    "gqa": ("testdev_balanced_questions.json", ("question", "imageId")),
    "hallusion_bench": ("HallusionBench.json", ("question", "gt_answer", "visual_input", "set_id")),
}


@pytest.mark.parametrize(("name", "field"), [(name, field) for name, (_, keys) in FIELDS.items() for field in keys])
def test_a_field_that_a_benchmarks_row_lacks_is_named(tmp_path: Path, name: str, field: str) -> None:
    path = write_benchmark(name, tmp_path) / FIELDS[name][0]
    content = json.loads(path.read_text())
    rows = list(content.values()) if isinstance(content, dict) else content
    del rows[0][field]
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=rf"{FIELDS[name][0]}: a row has no '{field}'"):
        make_benchmark(name).read(tmp_path)
