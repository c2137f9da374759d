"""MMBench and MMBench-CN: options in circular order, so that a lucky guess does not count."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

from evals.benchmark import (
    LETTER,
    LETTER_CN,
    LETTERS,
    Benchmark,
    Grade,
    Graded,
    Judge,
    MetricValue,
    Profile,
    Question,
    Total,
    grade_choice,
    list_options,
    split_by,
    split_by_category,
)
from evals.benchmarks.spreadsheet import SheetCell, write_xlsx
from evals.files import find, need, read_table
from evals.matching.letters import parse_letter, parse_mmbench
from evals.pictured_table import read_pictured_rows
from llava_ray.errors import DataError

ROTATION = 10**6
_NOTHING = ("", "nan", "none")
_V11 = "V11"
_NOT_UPLOADED = ("hint", "category", "source", "image", "comment", "l2-category")


class MMBench(Benchmark):
    """CircularEval: a question counts if all rotations of its options (rows index + k x 1,000,000) are answered right.

    Obtain: https://github.com/open-compass/MMBench. The folder holds ``mmbench_dev_20230712.tsv`` (CN:
    ``mmbench_dev_cn_20231003.tsv``) or another ``mmbench*.tsv``; images are inside. The test split has no answers: its
    submission file goes to the server.

    llava and official: "the answer is X", one lone letter among the last words, or the one option contained. robust:
    see ``matching.letters``. A question with a missing rotation is incomplete: neither right nor wrong, and
    counted apart.

    Robust, answer | truth | score (options teddy bear, rabbit, cat, dog)::

        'A.' | A | 1
        '(A)' | A | 1
        'a' | A | 1
        'a cute teddy bear' | A | 1
        'A cat' | C | 1
        '**C**' | C | 1
        'C) cat' | C | 1
        'The correct answer is **B**. Because the ears are long and A is a bear' | B | 1
        'I think the cat is on the mat' | C | 1
        '答案是B' | B | 1
        '选C。' | C | 1
        'B or C' | B | unparsed
        'A is wrong, B is right' | B | unparsed
        "Sorry, I can't help with images of people yet." | A | unparsed
        '' | A | unparsed
    """

    name = "mmbench"
    title = "MMBench"
    metric = "circular accuracy"
    is_mean = False
    max_new_tokens = 1024
    patterns: ClassVar[tuple[str, ...]] = ("mmbench_dev_2*.tsv", "mmbench_test_2*.tsv", "mmbench*en*.tsv", "*.tsv")
    instruction: ClassVar[str] = LETTER
    version: ClassVar[str] = ""
    """The mark of the version in the table's name; version 1.0 has none."""

    _table: Path | None = None

    def read(self, folder: Path) -> list[Question]:
        """Read the table, each row a question."""
        path = self._table = find(folder, *self.patterns)
        if self.version not in path.stem.upper() or (not self.version and _V11 in path.stem.upper()):
            raise DataError(
                f"{path} is a table of another version of MMBench, not of {self.title}: score it as that one."
            )
        return [self._question(row, image, path) for row, image in read_pictured_rows(path)]

    def grade(self, question: Question, answer: str, profile: Profile, judge: Judge | None = None) -> Grade:
        """Grade the letter of one rotation."""
        parse = parse_letter if profile == "robust" else parse_mmbench
        return grade_choice(parse(answer, question.options), question.truths)

    def add_up(self, rows: Sequence[Graded], profile: Profile) -> Total:
        """Compute circular accuracy, of all and by category, with vanilla (first rows) and mean over rows."""
        categories = {name: _circular(some) for name, some in split_by_category(rows).items()}
        first = [row for row in rows if row.id == row.group]
        metrics = {
            "vanilla": 100 * sum(row.score for row in first) / len(first) if first else None,
            "mean": 100 * sum(row.score for row in rows) / len(rows) if rows else None,
            "incomplete": float(sum(_incomplete(some) for some in _rotations(rows).values())),
        }
        return Total(_circular(rows).value, metrics, categories)

    def averaged(self, rows: Sequence[Graded], category: str | None = None) -> Sequence[Graded]:
        """Return a row for each complete question, correct if all its rotations are."""
        return [
            replace(some[0], id=name, score=float(all(row.score == 1 for row in some)), cluster=name)
            for name, some in _rotations(rows).items()
            if not _incomplete(some)
        ]

    def submit(self, questions: Sequence[Question], answers: Mapping[str, str]) -> dict[str, bytes]:
        """Build the server's table: LLaVA's columns, the prediction in the seventh place (or last)."""
        if self._table is None:
            return {}
        table: list[list[SheetCell]] = []
        for row in read_table(self._table):
            columns: dict[str, SheetCell] = {
                key: _cell(key, value) for key, value in row.items() if key.lower() not in _NOT_UPLOADED
            }
            table = table or [[*list(columns)[:6], "prediction", *list(columns)[6:]]]
            values = list(columns.values())
            table.append([*values[:6], answers.get(str(int(row["index"])), ""), *values[6:]])
        return {f"{self._table.stem}.xlsx": write_xlsx(table)}

    def _question(self, row: Mapping[str, str], image: bytes | None, path: Path) -> Question:
        index = int(need(row, "index", path))
        options: list[str] = []
        for letter in LETTERS:  # up to the first that is none
            if (row.get(letter) or "").strip().lower() in _NOTHING:
                break
            options.append(row[letter])
        hint = row.get("hint") or ""
        text = (f"{hint}\n" if hint.strip().lower() not in _NOTHING else "") + need(row, "question", path)
        answer = (row.get("answer") or "").strip()
        names = (row.get("l2-category") or row.get("L2-category"), row.get("category"))
        group = str(index % ROTATION)
        return Question(
            str(index),
            text + list_options(options) + self.instruction,
            () if image is None else (image,),
            (answer,) if answer.lower() not in _NOTHING else (),
            tuple(options),
            tuple(dict.fromkeys(name for name in names if name)),
            group,
            group,
        )


class MMBenchCN(MMBench):
    """MMBench in Chinese; see ``MMBench``, whose rules and vectors hold.

    Obtain: https://github.com/open-compass/MMBench. The folder holds ``mmbench_dev_cn_20231003.tsv`` or another
    ``mmbench*cn*.tsv``.
    """

    name = "mmbench_cn"
    title = "MMBench-CN"
    patterns = ("mmbench*cn*.tsv", "*.tsv")
    instruction = LETTER_CN


def _circular(rows: Sequence[Graded]) -> MetricValue:
    """Compute the share of complete questions with every rotation correct, in per cent."""
    complete = [some for some in _rotations(rows).values() if not _incomplete(some)]
    if not complete:
        return MetricValue(None, 0)
    return MetricValue(
        100 * sum(all(row.score == 1 for row in some) for some in complete) / len(complete), len(complete)
    )


def _rotations(rows: Sequence[Graded]) -> dict[str, list[Graded]]:
    return split_by(rows, lambda row: row.group)


def _incomplete(rows: Sequence[Graded]) -> bool:
    return any(row.state in ("missing", "failed") for row in rows)


def _cell(key: str, value: str | None) -> SheetCell:
    return int(value) if key == "index" and value else value or ""
