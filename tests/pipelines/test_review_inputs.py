"""What a review joins is whole, or refused by id: a reference that is not there never shrinks the benchmark."""

import json
from pathlib import Path

import pytest
from benchmark_files import write_benchmark
from review_files import flags, write_lines, write_review_files

from evals.benchmark import Question
from evals.benchmarks.custom import Custom
from evals.benchmarks.llava_bench import LLaVABench
from evals.benchmarks.science_qa import ScienceQA
from evals.scoring import score_answers
from llava_ray.errors import DataError
from pipelines.review import main


def keep_only(path: Path, num: int) -> None:
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:num]) + "\n")


@pytest.mark.parametrize("more", [(), ("--review.mode", "grade"), ("--review.max_items", "12")])
def test_a_dry_run_names_the_questions_without_a_reference(tmp_path: Path, more: tuple[str, ...]) -> None:
    files = write_review_files(tmp_path, 20)
    keep_only(files / "gpt4.jsonl", 10)
    num = "2 of 12" if "12" in more else "10 of 20"
    with pytest.raises(
        DataError, match=rf"gpt4.jsonl has no reference for {num} questions: 10, 11.*; add it, or leave"
    ):
        main([*flags(files, "http://127.0.0.1:9/v1", tmp_path / "out", *more), "--dry-run"])


def test_llava_bench_names_the_questions_without_reference_or_description(tmp_path: Path) -> None:
    folder = write_benchmark("llava_bench", tmp_path)
    questions = LLaVABench().read(folder)
    whole = (folder / "answers_gpt4.jsonl").read_text()
    keep_only(folder / "answers_gpt4.jsonl", len(questions) - 1)
    with pytest.raises(DataError, match=f"no reference for 1 of {len(questions)} questions: {questions[-1].id};"):
        LLaVABench().read(folder)
    (folder / "answers_gpt4.jsonl").write_text(whole)
    write_lines(folder / "context.jsonl", [])
    with pytest.raises(DataError, match=f"no image description for {len(questions)} of {len(questions)} questions"):
        LLaVABench().read(folder)


def test_questions_without_a_right_answer_beside_others_that_have_one_are_named() -> None:
    questions = [Question(str(i), "?", truths=("yes",) if i else (), facts={"rule": "exact"}) for i in range(3)]
    with pytest.raises(DataError, match="data of Custom have no right answer for 1 of 3 questions: 0; add it"):
        score_answers(Custom(), questions, [], "robust")


def test_a_wording_that_not_all_questions_have_is_no_wording(tmp_path: Path) -> None:
    folder = write_benchmark("science_qa", tmp_path)
    assert ScienceQA().read(folder)
    said = [{"id": "0", "conversations": [{"value": "<image>\nWhat?"}]}]
    (folder / "llava_test_CQM-A.json").write_text(json.dumps(said))
    with pytest.raises(DataError, match=r"llava_test_CQM-A.json has no wording for .* questions"):
        ScienceQA().read(folder)
