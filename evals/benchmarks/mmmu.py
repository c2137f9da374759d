"""MMMU: college questions in 30 subjects with several images (val: 900), 6 % of them open."""

import ast
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evals.benchmark import (
    LETTER,
    SHORT,
    UNPARSED,
    Benchmark,
    Grade,
    Judge,
    Profile,
    Question,
    grade_choice,
    list_options,
)
from evals.files import as_json, find_all, need, picture, read_parquet_rows
from evals.matching.letters import parse_letter, parse_mmmu
from evals.matching.open_answers import open_answer_is_right, parse_open_answer
from llava_ray.errors import DataError

_MAX_IMAGES = 7
_MARKER = re.compile(r"<image (\d+)>")
_OPEN = "open"


class MMMU(Benchmark):
    """Letters and open answers, averaged over questions (micro).

    Obtain: https://huggingface.co/datasets/MMMU/MMMU. The folder holds its Parquet files,
    ``SUBJECT/validation-*.parquet`` (images are inside). The category is the subject.

    llava and official: the authors' parsers; where theirs draws a letter at random, the answer is unparsed (expect 1/4
    of those less). robust: ``matching.letters``; an open answer counts if what is said last, after "is", "="
    or the like, is one number equal at two decimals, or holds the gold words and no "not" or "or".

    Robust, answer | truth | score (options teddy bear, rabbit, cat, dog; a truth of other form is an open question)::

        'B' | B | 1
        '(B) rabbit' | B | 1
        'The answer is (B).' | B | 1
        'B or C' | B | unparsed
        "I don't know" | B | unparsed
        '24' | 24 | 1
        'The answer is 24.' | 24 | 1
        '1,024' | 1024 | 1
        '3.141' | 3.14 | 1
        'x = 5' | 5 | 1
        '$8.5' | 8.5 | 1
        '6e3' | 6000 | 1
        'It is in Paris, France' | paris | 1
        '-12' | 12 | 0
        'It is 5 or 6' | 6 | unparsed
        '' | 6 | unparsed
    """

    name = "mmmu"
    title = "MMMU"
    max_new_tokens = 1024

    def read(self, folder: Path) -> list[Question]:
        """Read all subjects' validation files."""
        paths = find_all(folder, "*/validation-*.parquet", "validation-*.parquet", "*/*.parquet", "*.parquet")
        return [_question(row, path) for path in paths for row in read_parquet_rows(path)]

    def grade(self, question: Question, answer: str, profile: Profile, judge: Judge | None = None) -> Grade:
        """Grade a letter, or an open answer."""
        if question.options:
            parse = parse_letter if profile == "robust" else parse_mmmu
            return grade_choice(parse(answer, question.options), question.truths)
        if profile == "robust":
            parsed = parse_open_answer(answer)
            fits = parsed.fits(question.truths) if parsed else None
            return UNPARSED if parsed is None or fits is None else Grade(float(fits), parsed.text)
        return Grade(float(open_answer_is_right(answer, question.truths)), answer.strip())

    def submit(self, questions: Sequence[Question], answers: Mapping[str, str]) -> dict[str, bytes]:
        """Build the file for the authors' main_eval_only.py: letters, and open answers unchanged."""
        parsed = {
            q.id: (parse_letter(answers.get(q.id, ""), q.options) or "") if q.options else answers.get(q.id, "")
            for q in questions
        }
        return {"mmmu_upload.json": as_json(parsed)}


def _question(row: Mapping[str, Any], path: Path) -> Question:
    name, text = need(row, "id", path), need(row, "question", path)
    options = tuple(map(str, read_python_list(row["options"], name, path)))
    is_open = row.get("question_type") == _OPEN or not options
    prompt, content = place_numbered_images(
        text + ("" if is_open else list_options(options)) + (SHORT if is_open else LETTER), row, path
    )
    gold = row.get("answer")
    truths = (
        tuple(map(str, read_python_list(gold, name, path) if str(gold).startswith("[") else [gold]))
        if gold not in (None, "?")
        else ()
    )
    subject = re.sub(r"^(validation|dev|test)_|_\d+$", "", name)
    return Question(name, prompt, content, truths, () if is_open else options, (subject,), name)


def place_numbered_images(text: str, row: Mapping[str, Any], path: Path) -> tuple[str, tuple[bytes, ...]]:
    """Return a prompt with its images where the text refers to them; without references all come first."""
    images = {n: row.get(f"image_{n}") for n in range(1, _MAX_IMAGES + 1)}
    available = [number for number, cell in images.items() if cell is not None]
    order = [int(number) for number in _MARKER.findall(text) if int(number) in available]
    content = tuple(picture(images[number], path) for number in order or available)
    return _MARKER.sub(lambda mark: "<image>" if int(mark[1]) in available else "", text), content


def read_python_list(text: Any, name: str, path: Path) -> list[Any]:
    """Return a list that stands in a cell as Python writes it. Raises DataError."""
    if isinstance(text, list):
        return text
    try:
        value = ast.literal_eval(str(text))
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        value = None
    if not isinstance(value, list | tuple):
        raise DataError(f"{path}: question {name!r} has options {text!r:.200}; expected a list.")
    return list(value)
