"""Reading of MathVista's problems, from the authors' JSON or the hub's Parquet files."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from evals.benchmark import LETTERS, Question
from evals.files import (
    check_complete,
    check_unique,
    find_all,
    need,
    need_words,
    picture,
    read_json_value,
    read_parquet_rows,
    without_pictures,
)
from evals.matching.math_answers import normalise_extraction, parse_list
from llava_ray.errors import DataError

_HINTS = {
    "text": "Please answer the question and provide the correct option letter, e.g., A, B, C, D, at the end.",
    "integer": "Please answer the question requiring an integer answer and provide the final value, e.g., 1, 2, 3, at "
    "the end.",
    "list": "Please answer the question requiring a Python list as an answer and provide the final list, e.g., "
    "[1, 2, 3], [1.2, 1.3, 1.4], at the end.",
    "float": "Please answer the question requiring a floating-point number with {} and provide the final value, e.g., "
    "{}, at the end.",
}
_DECIMALS = {1: ("one decimal place", "1.2, 1.3, 1.4"), 2: ("two decimal places", "1.23, 1.34, 1.45")}
_CHOICE, _FREE = "multi_choice", "free_form"
_KEYS = ("language", "source", "category", "task", "context", "grade")
_TABLES = tuple(f"{folder}{name}.parquet" for name in ("testmini-*", "test-*", "*") for folder in ("data/", ""))


def read_problems(folder: Path) -> list[Question]:
    """Read the problems of one split as questions. Raises DataError."""
    paths = find_all(folder, "testmini.json", "test.json", *_TABLES)
    rows = [(row, path) for path in paths for row in _rows(path)]
    names = [str(row["pid"]) for row, _ in rows]
    check_unique(names, paths[0], "question")
    queries = _queries(folder, names)
    return [_question(row, queries, folder, path) for row, path in rows]


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    if path.suffix != ".json":
        for row in read_parquet_rows(path):
            need(row, "pid", path)
            yield row
        return
    content = read_json_value(path)
    if not isinstance(content, dict):
        raise DataError(f"{path} holds no object of problems by pid; is this the official file?")
    for name, row in content.items():
        if str(need(row, "pid", path)) != name:
            raise DataError(f"{path}: the problem {name!r} has the pid {row['pid']!r}; obtain the file again.")
        yield row


def _queries(folder: Path, names: Sequence[str]) -> Mapping[str, str]:
    """Return the authors' prompts, if their file is there. Raises DataError if it lacks some."""
    path = folder / "query.json"
    if not path.exists():
        return {}
    found = read_json_value(path)
    if not isinstance(found, dict):
        raise DataError(f"{path} holds no object of queries by pid; obtain it again, or leave it out.")
    check_complete(
        [name for name in names if not isinstance(found.get(name), str)], len(names), f"{path} has no query", "the file"
    )
    return found


def _question(row: Mapping[str, Any], queries: Mapping[str, str], folder: Path, path: Path) -> Question:
    name, kind = str(row["pid"]), str(need(row, "answer_type", path))
    _check_form(row, name, path)
    choices = tuple(map(str, row.get("choices") or ())) if row["question_type"] == _CHOICE else ()
    query = queries.get(name) or row.get("query") or _build_query(row, choices, kind)
    image = row.get("decoded_image")
    labels = row["metadata"]
    categories = [f"{key}: {labels[key]}" for key in _KEYS if labels.get(key)]
    categories += [f"skill: {skill}" for skill in labels.get("skills") or ()]
    return Question(
        name,
        str(query),
        (picture(image, path) if image is not None else folder / need_words(row, "image", name, path),),
        _truths(row, choices, name, path),
        choices,
        (f"question type: {row['question_type']}", f"answer type: {kind}", *categories),
        str(row.get("image") or name),
        facts={
            "answer_type": kind,
            "precision": int(row["precision"]) if kind == "float" else 0,
            "row": {key: value for key, value in without_pictures(row).items() if key != "decoded_image"},
        },
    )


def _check_form(row: Mapping[str, Any], name: str, path: Path) -> None:
    """Check that a problem's type, choices and precision fit together. Raises DataError."""
    kind, form, choices, labels = (
        need(row, key, path) for key in ("answer_type", "question_type", "choices", "metadata")
    )
    need_words(row, "question", name, path)
    if not isinstance(labels, dict) or not _are_texts(labels.get("skills") or []):
        fault = f"the metadata {labels!r:.80}"
    elif form not in (_CHOICE, _FREE) or kind not in tuple(_HINTS) or (form == _CHOICE) != (kind == "text"):
        fault = f"the question type {form!r} with the answer type {kind!r}"
    elif form == _CHOICE and not (_are_texts(choices) and 1 < len(choices) <= len(LETTERS)):
        fault = f"the choices {choices!r:.80}"
    elif kind == "float" and not _is_count(row.get("precision")):
        fault = f"a float as its answer, but the precision {row.get('precision')!r}"
    else:
        return
    raise DataError(f"{path}: problem {name!r} has {fault}; obtain the file again.")


def _are_texts(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(value, str) for value in values)


def _is_count(value: Any) -> bool:
    return isinstance(value, int | float) and value in range(1, 16)


def _is_of(kind: str, answer: str) -> bool:
    """Return whether a right answer has the form of its type."""
    if kind == "list":
        return parse_list(answer) is not None
    return normalise_extraction(answer, kind, (), 15) not in (None, "nan", "inf", "-inf")


def _truths(row: Mapping[str, Any], choices: Sequence[str], name: str, path: Path) -> tuple[str, ...]:
    """Return the right answer, a letter where there are choices; none in the test split. Raises DataError."""
    answer = "" if row.get("answer") is None else str(row["answer"])
    if not answer:
        return ()
    if not choices:
        if not _is_of(row["answer_type"], answer):
            raise DataError(f"{path}: the answer to problem {name!r} is {answer!r}, no {row['answer_type']}.")
        return (answer,)
    letters = tuple(letter for letter, choice in zip(LETTERS, choices, strict=False) if choice == answer)
    if not letters:
        raise DataError(f"{path}: the answer to problem {name!r} is {answer!r}, none of its choices.")
    return letters


def _build_query(row: Mapping[str, Any], choices: Sequence[str], kind: str) -> str:
    """Build the authors' prompt without examples: a hint, the question with its unit, and the choices."""
    precision = int(row["precision"]) if kind == "float" else 0
    places = _DECIMALS.get(precision, (f"{precision} decimal places", "1.2, 1.3, 1.4"))
    lines = [f"Hint: {_HINTS[kind].format(*places) if kind == 'float' else _HINTS[kind]}"]
    lines.append(f"Question: {row['question']}" + (f" (Unit: {row['unit']})" if row.get("unit") else ""))
    if choices:
        lines += ["Choices:", *(f"({letter}) {choice}" for letter, choice in zip(LETTERS, choices, strict=False))]
    return "\n".join(lines)
