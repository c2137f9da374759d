"""Files that people have: each fault names its file and what to do, before anything is asked or paid."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from review_files import write_review_files

from llava_ray.config.review import ReviewSection
from llava_ray.errors import DataError
from pipelines.review import main
from pipelines.review_inputs import Inputs, read_inputs

FILES = {
    "questions": "questions.jsonl",
    "context": "context.jsonl",
    "references": "gpt4.jsonl",
    "answers": "model.jsonl",
}


def read(files: Path) -> Inputs:
    """What a review of these files begins with, before anything else."""
    named = {kind: str(files / name) for kind, name in FILES.items()}
    return read_inputs(ReviewSection.parsed(named | {"answers": [named["answers"]]}))


def told(files: Path) -> str:
    """What is said of files that cannot be used."""
    with pytest.raises(DataError) as refused:
        read(files)
    return str(refused.value)


def pretty(content: bytes) -> bytes:
    """The rows as one JSON value over many lines."""
    return json.dumps([json.loads(line) for line in content.splitlines()], indent=1).encode()


DAMAGES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda content: b"", "is empty"),
    "blank": (lambda content: b"\n \n", "is empty"),
    "utf_16": (lambda content: content.decode().encode("utf-16"), "not UTF-8 (it looks like UTF-16): save it as UTF-8"),
    "utf_16_unmarked": (lambda content: content.decode().encode("utf-16-le"), "looks like UTF-16"),
    "latin_1": (lambda content: content.replace(b"picture", "Bild für".encode("latin-1")), "save it as UTF-8"),
    "gzip": (lambda content: b"\x1f\x8b\x08" + content, "it looks like gzip"),
    "no json": (lambda content: content + b"{", "is not JSON"),
    "deep": (lambda content: content + b"[" * 100_000, "is not JSON"),
    "pretty": (
        lambda content: json.dumps(list(map(json.loads, content.splitlines())), indent=1).encode(),
        "one object",
    ),
    "half a letter": (lambda content: content.replace(b"pic", b"\\ud800 pic", 1), "half a character"),
    "a number": (lambda content: b"7\n", ""),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("kind", FILES)
def test_a_damaged_file_is_named(tmp_path: Path, kind: str, damage: str) -> None:
    files = write_review_files(tmp_path / "files", 8)
    path = files / FILES[kind]
    change, words = DAMAGES[damage]
    content = path.read_bytes()
    path.write_bytes(change(content))
    if damage == "pretty" and kind in ("references", "answers"):  # a list of answers is an answers file
        read(files)
        return
    said = told(files)
    assert str(path) in said
    assert words in said
    assert "obtain it again" not in said
    assert "\n" not in said


def test_an_id_that_is_there_twice_is_named(tmp_path: Path) -> None:
    for kind, name in FILES.items():
        files = write_review_files(tmp_path / kind, 8)
        path = files / name
        first = json.loads(path.read_text().splitlines()[0])
        other = first | {
            key: ["Another."] if key == "caption" else "Another." for key in ("text", "caption") if key in first
        }
        path.write_text(path.read_text() + json.dumps(other) + "\n")
        said = told(files)
        assert str(path) in said
        assert repr(str(first.get("question_id", first.get("image")))) in said
    # The same answer twice means one thing.
    files = write_review_files(tmp_path / "same", 8)
    path = files / "model.jsonl"
    path.write_text(path.read_text() * 2)
    read(files)


@pytest.mark.parametrize(
    ("name", "row", "words"),
    [
        (
            "questions.jsonl",
            {"question_id": "q", "image": "000.jpg", "text": None},
            "'text' of question 'q' is no text",
        ),
        ("questions.jsonl", {"image": "000.jpg", "text": "?"}, "has no 'question_id'"),
        ("context.jsonl", {"image": "x", "caption": [1]}, "the description of 'x'"),
        ("context.jsonl", {"image": "x", "caption": "a", "instances": [1]}, "instances that are no boxes"),
        ("model.jsonl", {"question_id": 1, "text": {"a": 1}}, "the answer to 1 is no text"),
    ],
)
def test_a_row_that_cannot_be_asked_is_named(tmp_path: Path, name: str, row: dict[str, object], words: str) -> None:
    files = write_review_files(tmp_path / "files", 8)
    with (files / name).open("a") as file:
        file.write(json.dumps(row) + "\n")
    said = told(files)
    assert name in said
    assert words in said


def test_review_files_that_are_none_are_named(tmp_path: Path) -> None:
    path = tmp_path / "review.jsonl"
    for content, words in (
        ("", "is empty"),
        ('{"question_id": 1, "tuple": [null, 8]}', "expected two numbers"),
        ('{"question_id": 1, "tuple": ["8", "9"]}', "expected two numbers"),
        ('{"question_id": 1, "tuple": [NaN, 9]}', "expected two numbers"),
        ('{"question_id": 1, "tuple": true}', "expected two numbers"),
    ):
        path.write_text(content)
        with pytest.raises(DataError, match=words):
            main(["summarize", str(path)])
