"""MMMU-Pro: letters by the authors' rule on replies of their own files, three settings kept apart."""

import json
from pathlib import Path

import pytest
from benchmark_files import METALS, mmmu_pro_rows, parquet, write_benchmark

from evals.answers import Answer
from evals.benchmarks.mmmu_pro import MMMUPro, MMMUPro4, MMMUProVision
from evals.matching.letters import parse_mmmu_pro
from evals.ranking import ranking_prompt
from evals.scoring import score_answers, summarize_result
from llava_ray.errors import DataError


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("Answer: A", "A"),
        ("Answer: (H)", "H"),
        ("It is about 6.66%.\n\nAnswer: G", "G"),
        ("the sum matches option \\( \\text{G} \\).\n\nAnswer: G", "G"),
        ("Answer: B is wrong.\nAnswer: C", "C"),
        ("It is not (B).\nAnswer: unclear\nAnswer: C", "C"),
        ("I'm sorry, I can't help with that.", "I"),  # as their own files have it
        ("I think it is (C) or (F)", "F"),
        ("Answer: C or D", "D"),  # two after the label: MMMU's rule, the last one
        ("J", "J"),
        ("J.", "J"),
        ("K", None),
        ("The thing in the picture is certainly made of zinc", "E"),
        ("zinc", None),
        ("", None),
    ],
)
def test_the_authors_rule(answer: str, letter: str | None) -> None:
    assert parse_mmmu_pro(answer, METALS) == letter


def test_prompts_and_images_are_the_authors(tmp_path: Path) -> None:
    first, _ = MMMUPro().read(write_benchmark("mmmu_pro", tmp_path / "ten"))
    assert first.prompt.startswith("<image> Which metal is like <image>?\nA. gold\nB. tin\n")
    assert first.prompt.endswith("\nJ. radium\nAnswer with the option letter from the given choices directly.")
    assert len(first.images) == 2
    assert ranking_prompt(first, "text").endswith("\nJ. radium")
    assert ranking_prompt(first, "letter") == first.prompt
    seen, _ = MMMUProVision().read(write_benchmark("mmmu_pro_vision", tmp_path / "vision"))
    assert seen.prompt == (
        "Answer with the option letter from the given choices directly. The last line of your response should be of "
        "the following format: 'Answer: $LETTER' (without quotes) where LETTER is one of options."
    )
    assert (len(seen.images), seen.options) == (1, tuple(METALS))


def test_images_follow_shuffled_options(tmp_path: Path) -> None:
    row = mmmu_pro_rows(10)[0] | {"question": "Which?", "options": "['<image 2>', '<image 1>']"}
    parquet(tmp_path, "standard (10 options)/test-0.parquet", [row])
    (question,) = MMMUPro().read(tmp_path)
    assert question.images == (row["image_2"]["bytes"], row["image_1"]["bytes"])


def test_subjects_and_disciplines(tmp_path: Path) -> None:
    questions = MMMUPro().read(write_benchmark("mmmu_pro", tmp_path))
    answers = [Answer("test_Art_113", "Answer: B"), Answer("validation_Energy_and_Power_2", "A")]
    found = summarize_result(score_answers(MMMUPro(), questions, answers, "official"))
    scores = {name: one["score"] for name, one in found["categories"].items()}
    assert scores == {"Art": 100, "Art and Design": 100, "Energy_and_Power": 0, "Tech and Engineering": 0}
    assert (found["score"], found["whole_set"]) == (50, 1_730)


def test_the_file_for_their_evaluation(tmp_path: Path) -> None:
    questions = MMMUPro4().read(write_benchmark("mmmu_pro_4", tmp_path))
    rows = MMMUPro4().submit(questions, {"test_Art_113": "B"})["llava_ray_standard_direct.jsonl"].decode().splitlines()
    first, second = map(json.loads, rows)
    assert (first["id"], first["response"], second["response"]) == ("test_Art_113", "B", "")
    assert first["options"] == str(METALS[:4])
    assert not any(key.startswith("image") for key in first)


def test_another_settings_files_are_refused(tmp_path: Path) -> None:
    parquet(tmp_path / "4", "test-0.parquet", mmmu_pro_rows(4))
    parquet(tmp_path / "10", "test-0.parquet", mmmu_pro_rows(10))
    assert len(MMMUPro().read(tmp_path / "10")) == len(MMMUPro4().read(tmp_path / "4")) == 2
    with pytest.raises(DataError, match=r"0 of 2 questions have more than 4 options; is this another setting than"):
        MMMUPro().read(tmp_path / "4")
    with pytest.raises(DataError, match="2 of 2 questions have more than 4 options"):
        MMMUPro4().read(tmp_path / "10")
    with pytest.raises(DataError, match=r"has no vision/test-\*.parquet"):
        MMMUProVision().read(tmp_path)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"answer": "K"}, "the answer to 'test_Art_113' is 'K', none of its 10 options"),
        ({"answer": "AB"}, "the answer to 'test_Art_113' is 'AB'"),
        ({"options": "gold, tin"}, "question 'test_Art_113' has options 'gold, tin'; expected a list"),
        ({"options": "'gold'"}, ".*expected a list"),
        ({"image_1": None, "image_2": None}, "question 'test_Art_113' has no image"),
    ],
)
def test_damaged_rows_are_named(tmp_path: Path, change: dict[str, object], fault: str) -> None:
    parquet(tmp_path, "standard (10 options)/test-0.parquet", [mmmu_pro_rows(10)[0] | change])
    with pytest.raises(DataError, match=rf"test-0.parquet: {fault}"):
        MMMUPro().read(tmp_path)


def test_an_image_in_a_column_of_another_name_is_not_submitted(tmp_path: Path) -> None:
    row = mmmu_pro_rows(10)[0]
    row["imagd_2"] = row.pop("image_2")
    parquet(tmp_path, "standard (10 options)/test-0.parquet", [row])
    questions = MMMUPro().read(tmp_path)
    assert b"imagd" not in MMMUPro().submit(questions, {})["llava_ray_standard_direct.jsonl"]
