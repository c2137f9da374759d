"""Readers of a review's input files, with errors that name the file, and unique ids."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evals.answers import JoinedAnswers, match_answers, read_answers
from evals.benchmark import Question
from evals.files import list_first, need, read_lines
from llava_ray.errors import DataError


def read_question_rows(path: Path, what: str) -> list[dict[str, Any]]:
    """Read the rows of a file of JSON lines. Raises DataError if it is empty or has text that cannot be sent."""
    rows = read_lines(path)
    if not rows:
        raise DataError(f"{path} is empty: it should hold {what}, one JSON object a line.")
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise DataError(f"{path}: row {number} is no JSON object; {what} are expected, one a line.")
        _check_whole(row, f"{path}: row {number}")
    return rows


def _check_whole(row: Any, where: str) -> None:
    """Check a row for lone surrogates, which no file or request can hold. Raises DataError."""
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except ValueError as error:
        raise DataError(f"{where} holds half a character (a lone surrogate such as \\ud800); repair it.") from error


def read_contexts(path: Path) -> dict[str, Any]:
    """Read the image descriptions, by image. Raises DataError for two descriptions of one image."""
    found: dict[str, Any] = {}
    for row in read_question_rows(path, "descriptions of images (image, caption)"):
        image = str(need(row, "image", path))
        if found.setdefault(image, row) != row:
            raise DataError(f"{path}: image {image!r} has two different descriptions; leave one in it.")
        _check_description(row, f"{path}: the description of {image!r}")
    return found


def _check_description(row: Mapping[str, Any], where: str) -> None:
    """Check that captions are texts and boxes are valid. Raises DataError."""
    captions = row.get("captions", row.get("caption", ""))
    if not isinstance(captions, str) and not (
        isinstance(captions, list) and all(isinstance(text, str) for text in captions)
    ):
        raise DataError(f"{where} has a caption that is neither a text nor a list of texts: {captions!r:.80}")
    boxes = row.get("instances", [])
    if not isinstance(boxes, list) or not all(
        isinstance(box, dict) and {"category", "bbox"} <= set(box) for box in boxes
    ):
        raise DataError(f"{where} has instances that are no boxes; each is {{'category': …, 'bbox': [x1, y1, x2, y2]}}")


def join_answers(questions: Sequence[Question], path: Path) -> JoinedAnswers:
    """Read answers and match them to their questions. Raises DataError for different answers to a question."""
    answers = read_answers(path)
    if not answers:
        raise DataError(f"{path} is empty: it should hold answers, one JSON object with question_id and text a line.")
    for answer in answers:
        _check_whole(answer.text, f"{path}: the answer to question {answer.id!r}")
    joined = match_answers(questions, answers)
    if joined.conflicting:
        raise DataError(
            f"{path} has different answers to the same question {list_first(joined.conflicting)}; keep one of each."
        )
    return joined
