"""OCRBench: 1,000 questions about text in images, each worth one point."""

import ast
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from evals.benchmark import UNPARSED, Benchmark, Grade, Graded, Judge, Profile, Question, Total, by_category, percentage
from evals.files import (
    as_json,
    find,
    find_all,
    need,
    need_words,
    picture,
    read_json_value,
    read_parquet_rows,
    without_pictures,
)
from evals.matching.plain_text import to_plain_text, without_label
from evals.pictured_table import read_pictured_rows
from llava_ray.errors import DataError

_FORMULAS = "Handwritten Mathematical Expression Recognition"
_FORMULA_SET = "HME100k"
_RECOGNITION = tuple(
    f"{kind} Recognition"
    for kind in ("Regular Text", "Irregular Text", "Artistic Text", "Handwriting", "Digit String", "Non-Semantic Text")
)
_COMPONENTS: Mapping[str, tuple[str, ...]] = {
    "Text Recognition": _RECOGNITION,
    **{
        name: (name,)
        for name in ("Scene Text-centric VQA", "Doc-oriented VQA", "Key Information Extraction", _FORMULAS)
    },
}
_KINDS = frozenset(kind for kinds in _COMPONENTS.values() for kind in kinds)
_PLAIN_SPACES = re.compile(r"\\[,;:! ]|[\s~$]+|\\[()\[\]]")


class OCRBench(Benchmark):
    r"""Points: questions with one of the right texts in the answer; the whole set has 1,000.

    Obtain: https://github.com/Yuliang-Liu/MultimodalOCR (``OCRBench.json`` and ``OCRBench_Images/``), or the hub's
    ``test-*.parquet`` (also in ``data/``), or OpenCompass's ``OCRBench.tsv``. An id is the row's number, from 0.

    llava and official: a right text is contained in the answer, without case; of handwritten formulas without spaces
    and with case. robust: both as plain text, and a right text that begins or ends in a letter or digit is no part
    of a longer word or number; formulas without spaces and dollar signs.

    Robust, answer | truth | score::

        'CENTRE' | CENTRE | 1
        'The word is "centre".' | CENTRE | 1
        '**Centre**' | CENTRE | 1
        'Answer: centre' | CENTRE | 1
        'the centres' | CENTRE | 0
        'FRIEND' | CENTRE | 0
        '1985' | 85 | 0
        'It is 85.' | 85 | 1
        '$12.50' | 12.50 | 1
        'new\nyork' | New York | 1
        '上海市浦东' | 上海 | 1
        '...' | ok | 0
        ' ' | ok | unparsed
        '' | ok | unparsed
    """

    name = "ocrbench"
    title = "OCRBench"
    metric = "points"
    maximum = 1000.0
    is_mean = False

    def read(self, folder: Path) -> list[Question]:
        """Read the questions of one of the forms."""
        return [_question(str(number), row, path) for number, (row, path) in enumerate(_rows(folder))]

    def grade(self, question: Question, answer: str, profile: Profile, judge: Judge | None = None) -> Grade:
        """Grade by containment."""
        said = answer.strip() if profile != "robust" else without_label(to_plain_text(answer))
        if not said:
            return UNPARSED
        is_formula = bool(question.facts.get("is_formula"))
        if profile != "robust":
            return Grade(float(any(_contains(said, truth, is_formula=is_formula) for truth in question.truths)), said)
        holds = _holds_formula if is_formula else _holds_words
        return Grade(float(any(holds(answer if is_formula else said, truth) for truth in question.truths)), said)

    def add_up(self, rows: Sequence[Graded], profile: Profile) -> Total:
        """Count points: of all, and of the five components; by category in per cent."""
        metrics: dict[str, float | None] = {"accuracy": percentage(rows).value}
        for name, kinds in _COMPONENTS.items():
            some = [row.score for row in rows if set(kinds) & set(row.categories)]
            metrics[name] = sum(some) if some else None
        return Total(sum(row.score for row in rows) if rows else None, metrics, by_category(rows))

    def averaged(self, rows: Sequence[Graded], category: str | None = None) -> Sequence[Graded] | None:
        """Return the rows of a category, whose metric is a mean; the headline is a sum."""
        return None if category is None else rows

    def submit(self, questions: Sequence[Question], answers: Mapping[str, str]) -> dict[str, bytes]:
        """Build the authors' result file: the rows with predictions and results."""
        rows = []
        for question in questions:
            said = answers.get(question.id, "")
            result = int(self.grade(question, said, "official").score)
            rows.append({**question.facts["row"], "predict": said, "result": result})
        return {"OCRBench_result.json": as_json(rows)}


def _contains(said: str, truth: str, *, is_formula: bool) -> bool:
    """Return whether the authors' script finds a right text in an answer."""
    if is_formula:
        return _without_spaces(truth) in _without_spaces(said)
    return truth.lower().strip().replace("\n", " ") in said.lower().strip().replace("\n", " ")


def _without_spaces(text: str) -> str:
    return text.strip().replace("\n", " ").replace(" ", "")


def _holds_formula(said: str, truth: str) -> bool:
    """Return whether an answer has a formula, without spaces and dollar signs."""
    return _PLAIN_SPACES.sub("", truth) in _PLAIN_SPACES.sub("", said)


def _holds_words(said: str, truth: str) -> bool:
    """Return whether a plain text has a right text that is no part of a longer word or number."""
    words = " ".join(to_plain_text(truth).casefold().split())
    if not words:
        return truth.strip().casefold() in said.casefold()
    text = " ".join(said.casefold().split())
    before = r"(?<![a-z0-9])" if words[0].isascii() and words[0].isalnum() else ""
    after = r"(?![a-z0-9])" if words[-1].isascii() and words[-1].isalnum() else ""
    return re.search(before + re.escape(words) + after, text) is not None


def _rows(folder: Path) -> Iterator[tuple[dict[str, Any], Path]]:
    """Yield the rows of a folder in the authors' keys, with the image's bytes or path."""
    listed = next(iter(sorted([*folder.glob("OCRBench.json"), *folder.glob("OCRBench/OCRBench.json")])), None)
    if listed is not None:
        rows = read_json_value(listed)
        if not isinstance(rows, list):
            raise DataError(f"{listed} holds no list of questions; is this the official file?")
        for number, row in enumerate(rows):
            file = folder / "OCRBench_Images" / need_words(row, "image_path", str(number), listed)
            yield {**row, "image": file}, listed
    elif any(folder.glob("*.tsv")):
        path = find(folder, "OCRBench*.tsv", "*.tsv")
        for cells, image in read_pictured_rows(path):
            kind, answers = need(cells, "category", path), _list_of(need(cells, "answer", path))
            yield {"question": need(cells, "question", path), "answers": answers, "type": kind, "image": image}, path
    else:
        places = ("OCRBench.json", "test-*.parquet", "data/test-*.parquet", "*.parquet", "data/*.parquet")
        for path in find_all(folder, *places):
            for row in read_parquet_rows(path):
                names = {"dataset": "dataset_name", "question_type": "type", "answer": "answers"}
                content = picture(need(row, "image", path), path)
                yield {names.get(key, key): value for key, value in row.items()} | {"image": content}, path


def _list_of(cell: str) -> Any:
    """Return a cell's list, which stands there as Python writes it, or the cell."""
    try:
        value = ast.literal_eval(cell)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return cell
    return value if isinstance(value, list | tuple) else cell  # "12.50" is no number here


def _question(name: str, row: Mapping[str, Any], path: Path) -> Question:
    kind, found = str(need(row, "type", path)), need(row, "answers", path)
    if kind not in _KINDS:
        raise DataError(f"{path}: row {name} is of the type {kind!r}, none of OCRBench's; is this the official file?")
    found = found if isinstance(found, list | tuple) else [found]
    truths = tuple(truth for truth in found if isinstance(truth, str) and truth.strip())
    if not truths or len(truths) < len(found):
        raise DataError(f"{path}: row {name} has no right answer; obtain the file again.")
    image = row["image"]
    if image is None:
        raise DataError(f"{path}: row {name} has no image; obtain the file again.")
    source = str(row.get("dataset_name") or "")
    kept = {key: value for key, value in without_pictures(row).items() if key != "image"}
    aliases = (f"{source}/{row['id']}",) if source and "id" in row else ()
    return Question(
        name,
        need_words(row, "question", name, path),
        (image,),
        truths,
        categories=tuple(dict.fromkeys(part for part in (kind, source) if part)),
        cluster=str(row.get("image_path") or name),
        aliases=aliases,
        facts={"row": kept, "is_formula": source == _FORMULA_SET or (not source and kind == _FORMULAS)},
    )
