"""MMStar: the authors' rule for letters, both forms of the data, the table for the leaderboard."""

import base64
import io
import zipfile
from pathlib import Path

import pytest
from benchmark_files import encoded, parquet, put, write_benchmark

from evals.answers import Answer
from evals.benchmarks.mmstar import MMStar, parse_mmstar
from evals.scoring import score_answers, summarize_result
from llava_ray.errors import DataError

FRUITS = ("apple", "pear", "plum", "fig")
COLUMNS = ("index", "question", "image", *"ABCD", "answer", "category", "l2_category", "bench")


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("A", "A"),
        ("a", "A"),
        (" B\n", "B"),
        ("(c) plum", "C"),
        ("Option D", "D"),
        ("The answer is B.", "B"),
        ("apple", "A"),  # whatever begins so
        ("Because", "B"),
        ("The answer: B", None),
        ("It is B", None),
        ("**B**", None),
        ("E", None),
        ("(", None),
        ("", None),
    ],
)
def test_the_authors_rule(answer: str, letter: str | None) -> None:
    assert parse_mmstar(answer, 4) == letter


def table(folder: Path, *rows: dict[str, str]) -> None:
    full = {
        "index": "0",
        "question": "Which fruit?",
        "image": base64.b64encode(encoded()).decode(),
        **dict(zip("ABCD", FRUITS, strict=True)),
        "answer": "B",
        "category": "math",
        "l2_category": "geometry",
        "bench": "MathVista",
    }
    lines = [COLUMNS, *([(full | row)[name] for name in COLUMNS] for row in rows)]
    put(folder, "MMStar.tsv", "".join("\t".join(line) + "\n" for line in lines))


def test_both_forms_are_read(tmp_path: Path) -> None:
    table(tmp_path / "kit", {})
    (question,) = MMStar().read(tmp_path / "kit")
    assert question.prompt.startswith("Which fruit?\nA. apple\nB. pear")
    assert (question.options, question.truths, question.categories) == (FRUITS, ("B",), ("math", "math (geometry)"))
    first, *_ = MMStar().read(write_benchmark("mmstar", tmp_path / "hub"))
    assert (first.options, first.truths) == (FRUITS, ("A",))
    assert first.prompt.count("apple") == 1
    assert isinstance(first.images[0], bytes)


def test_options_that_are_not_in_the_text_are_four_letters(tmp_path: Path) -> None:
    row = {
        "index": 3,
        "question": "Which of those in the image?",
        "answer": "D",
        "category": "math",
        "l2_category": "x",
    }
    parquet(tmp_path, "mmstar.parquet", [row | {"image": {"bytes": encoded(), "path": None}}])
    (question,) = MMStar().read(tmp_path)
    assert question.options == tuple("ABCD")
    assert MMStar().grade(question, "(D)", "robust").score == 1


def test_abilities_and_axes(tmp_path: Path) -> None:
    questions = MMStar().read(write_benchmark("mmstar", tmp_path))
    answers = [Answer("0", "A"), Answer("1", "A"), Answer("2", "The answer is C")]
    found = summarize_result(score_answers(MMStar(), questions, answers, "official"))
    scores = {name: (one["score"], one["num"]) for name, one in found["categories"].items()}
    assert scores["coarse perception"] == scores["coarse perception (image emotion)"] == (50, 2)
    assert scores["math (geometry)"] == (100, 1)
    assert found["score"] == 66.6667


def test_the_table_for_the_leaderboard(tmp_path: Path) -> None:
    questions = MMStar().read(write_benchmark("mmstar", tmp_path))
    with zipfile.ZipFile(io.BytesIO(MMStar().submit(questions, {"1": "B"})["MMStar.xlsx"])) as book:
        sheet = book.read("xl/worksheets/sheet1.xml").decode()
    assert "prediction</t></is></c></row>" in sheet
    assert sheet.count('<t xml:space="preserve">B</t></is></c></row>') == 1
    assert "bytes" not in sheet


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"answer": "E"}, "the answer to question '0' is 'E', none of its 4 options"),
        ({"answer": "7"}, "the answer to question '0' is '7'"),
        ({"index": "zero"}, "line 2: the index is 'zero', no number"),
        ({"image": "12"}, "the images of rows '0' are those of rows without one"),
        ({"image": ""}, "question '0' has no image"),
    ],
)
def test_damaged_rows_are_named(tmp_path: Path, change: dict[str, str], fault: str) -> None:
    table(tmp_path, change)
    with pytest.raises(DataError, match=rf"MMStar.tsv(?:,|:) {fault}"):
        MMStar().read(tmp_path)


def test_an_index_that_is_there_twice_is_named(tmp_path: Path) -> None:
    table(tmp_path, {}, {"answer": "C"})
    with pytest.raises(DataError, match="question '0' occurs more than once; keep one of each"):
        MMStar().read(tmp_path)
