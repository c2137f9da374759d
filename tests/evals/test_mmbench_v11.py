"""MMBench v1.1: rotations, images by reference, a judge's letters, versions kept apart."""

import io
import zipfile
from pathlib import Path

import pytest
from benchmark_files import encoded, mmbench_v11_table, put, write_benchmark

from evals.answers import Answer, RecordedJudge
from evals.benchmark import Question
from evals.benchmarks.mmbench import MMBench
from evals.benchmarks.mmbench_v11 import MMBenchV11, MMBenchV11CN
from evals.pictured_table import read_pictured_rows
from evals.scoring import score_answers, summarize_result
from llava_ray.errors import DataError

NAME = "MMBench_DEV_EN_V11.tsv"
ANIMALS = ("teddy bear", "rabbit", "cat", "dog")


def read(folder: Path) -> list[Question]:
    return MMBenchV11().read(write_benchmark("mmbench_v11", folder))


def test_a_rotations_image_is_the_first_rows(tmp_path: Path) -> None:
    questions = read(tmp_path)
    assert [question.images for question in questions] == [(encoded(7),)] * 4 + [(encoded(8),)] * 3
    assert questions[1].options == ("rabbit", "cat", "dog", "teddy bear")
    assert questions[0].categories == ("perception", "object")


def test_a_question_counts_if_all_its_rotations_are_right(tmp_path: Path) -> None:
    questions = read(tmp_path)
    right = [Answer(question.id, question.truths[0]) for question in questions]
    assert summarize_result(score_answers(MMBenchV11(), questions, right, "official"))["score"] == 100
    wrong = [*right[:3], Answer(questions[3].id, "B"), *right[4:]]
    found = summarize_result(score_answers(MMBenchV11(), questions, wrong, "official"))
    assert (found["score"], found["figures"]["vanilla"], found["figures"]["mean"]) == (50, 100, 85.7143)
    lost = summarize_result(score_answers(MMBenchV11(), questions, [*right[:3], *right[4:]], "official"))
    assert (lost["score"], lost["figures"]["incomplete"], lost["missing"]) == (None, 1, 1)


@pytest.mark.parametrize(
    ("reply", "state", "score"),
    [
        ("C", "scored", 1),
        ("A", "scored", 0),
        ("Your output: C", "scored", 1),
        ("Z", "unparsed", 0),
        ("no idea", "failed", 0),
        ("", "failed", 0),
        (None, "failed", 0),
    ],
)
def test_a_judge_reads_what_the_rule_does_not(reply: str | None, state: str, score: int) -> None:
    question = Question("7", "?", truths=("C",), options=ANIMALS)
    judge = RecordedJudge({} if reply is None else {"7": reply})
    grade = MMBenchV11().grade(question, "a small feline", "official", judge)
    assert (grade.state, grade.score) == (state, score)
    assert MMBenchV11().grade(question, "a small feline", "official").state == "unparsed"
    assert MMBenchV11().grade(question, "a small feline", "robust", judge).state == "unparsed"
    assert MMBenchV11().grade(question, "D", "official", judge).parsed == "D"


def test_versions_are_kept_apart(tmp_path: Path) -> None:
    write_benchmark("mmbench_v11", tmp_path / "new")
    write_benchmark("mmbench", tmp_path / "old")
    with pytest.raises(DataError, match=rf"{NAME} is a table of another version of MMBench, not of MMBench: score it"):
        MMBench().read(tmp_path / "new")
    with pytest.raises(DataError, match=r"mmbench_dev_20230712.tsv is a table of another version .* not of MMBench v1"):
        MMBenchV11().read(tmp_path / "old")
    with pytest.raises(DataError, match=r"has no MMBench_DEV_CN_V11\*.tsv"):
        MMBenchV11CN().read(tmp_path / "new")


def test_the_table_for_the_server(tmp_path: Path) -> None:
    benchmark = MMBenchV11()
    benchmark.read(write_benchmark("mmbench_v11", tmp_path))
    questions = benchmark.read(tmp_path)
    files = benchmark.submit(questions, {"7": "C", "1000007": "a small feline"})
    with zipfile.ZipFile(io.BytesIO(files["MMBench_DEV_EN_V11.xlsx"])) as book:
        sheet = book.read("xl/worksheets/sheet1.xml").decode()
    header, first, *others = [
        row.replace("</t>", "<t").split('<t xml:space="preserve">')[1:] for row in sheet.split("<row>")[1:]
    ]
    names = [cell.partition("<")[0] for cell in header]
    wanted = "index question hint A B C D answer category source l2-category split prediction"
    assert " ".join(names) == wanted
    assert first[-1].startswith("C<")
    assert len(others) == 6
    assert "feline" in files["judge_requests.jsonl"].decode()


def lines() -> list[str]:
    return mmbench_v11_table().splitlines(keepends=True)


@pytest.mark.parametrize(
    ("kept", "fault"),
    [
        ((0, 1, 2, 3, 5, 6, 7), "lacks rotations of questions '7'"),
        ((0, 1, 2, 4, 5, 6, 7), "lacks rotations of questions '7'"),
        ((0, 2, 3, 4, 5, 6, 7), "the images of rows '1000007', '2000007', '3000007' are those of rows without one"),
    ],
)
def test_lost_rows_are_named(tmp_path: Path, kept: tuple[int, ...], fault: str) -> None:
    put(tmp_path, NAME, "".join(lines()[number] for number in kept))
    with pytest.raises(DataError, match=rf"{NAME}:? {fault}"):
        MMBenchV11().read(tmp_path)


def test_rotations_with_a_gap_are_named(tmp_path: Path) -> None:
    put(tmp_path, NAME, mmbench_v11_table().replace("2000008\t", "3000008\t"))
    with pytest.raises(DataError, match=rf"{NAME} lacks rotations of questions '8'"):
        MMBenchV11().read(tmp_path)


def test_a_row_that_was_cut_off_is_named(tmp_path: Path) -> None:
    put(tmp_path, NAME, mmbench_v11_table()[:-40])
    with pytest.raises(DataError, match=rf"{NAME}, line 8: a row has not as many cells as the header"):
        read_pictured_rows(tmp_path / NAME)
