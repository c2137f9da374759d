"""RealWorldQA: 765 everyday photographs; letters and short answers mixed."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from evals.benchmark import UNPARSED, Benchmark, Grade, Judge, Profile, Question, grade_choice
from evals.benchmarks.gqa import plain_words
from evals.files import find_all, need, picture, read_lines, read_parquet_rows
from evals.matching.letters import parse_letter
from evals.matching.plain_text import to_plain_text, without_lead_in
from evals.matching.quantities import stated_quantity, whole_quantity
from evals.matching.yes_no import parse_yes_no

_OPTION = re.compile(r"^([A-E])\.\s*(.+)$", re.MULTILINE)
_LABELLED = re.compile(r"\s*(?:([A-E])\.|\(([A-E])\))")


class RealWorldQA(Benchmark):
    """Letters where the question lists options, else a word or a number.

    Obtain: https://huggingface.co/datasets/xai-org/RealworldQA. The folder holds its Parquet files (also in ``data/``),
    or ``annotations.jsonl`` with the images it names; questions bring their own instruction.

    llava and official: "X." or "(X)" in front is a letter, a final period goes, then equality, of words without case.
    robust: ``evals.matching.letters.parse_letter`` for letters, ``matching.yes_no`` for yes and no; for a number,
    the only stated number, in digits or words.

    Robust, answer | truth | score (options Left, Right, Straight where the truth is a letter)::

        'A. Left' | A | 1
        '(B)' | B | 1
        'b' | B | 1
        'Right' | B | 1
        'Left or right' | A | unparsed
        '2.' | 2 | 1
        'two' | 2 | 1
        'Yes, it is' | Yes | 1
        'no' | No | 1
        'perhaps' | No | unparsed
        'Stop.' | stop | 1
        '' | 2 | unparsed
    """

    name = "realworldqa"
    title = "RealWorldQA"

    def read(self, folder: Path) -> list[Question]:
        """Read the Parquet files."""
        return list(_read(folder))

    def grade(self, question: Question, answer: str, profile: Profile, judge: Judge | None = None) -> Grade:
        """Grade a letter, yes or no, or a word."""
        truth = question.truths[0]
        if profile != "robust":
            label = _LABELLED.match(answer)
            parsed = (label[1] or label[2]) if label else answer.strip().rstrip(".")
            same = parsed == truth if len(truth) == 1 else parsed.lower() == truth.lower()
            return Grade(float(same), parsed)
        if question.options:
            return grade_choice(parse_letter(answer, question.options), question.truths)
        if truth.lower() in ("yes", "no"):
            return grade_choice(parse_yes_no(answer), [truth.lower()])
        parsed, goal = plain_words(answer), whole_quantity(to_plain_text(truth))
        if goal is not None:
            number = stated_quantity(without_lead_in(to_plain_text(answer)))
            return UNPARSED if number is None else Grade(float(number.value == goal.value), parsed)
        return Grade(float(parsed == plain_words(truth)), parsed) if parsed else UNPARSED


def _read(folder: Path) -> Iterator[Question]:
    for number, (row, path) in enumerate(_rows(folder)):
        text, truth = need(row, "question", path), str(need(row, "answer", path))
        options = tuple(option.strip() for _, option in _OPTION.findall(text))
        lettered = len(truth) == 1 and truth.isupper()
        image = row.get("image")
        images = () if image is None else (folder / image,) if isinstance(image, str) else (picture(image, path),)
        kind = "letter" if lettered else "word"
        yield Question(str(number), text, images, (truth,), options if lettered else (), (kind,), str(number))


def _rows(folder: Path) -> Iterator[tuple[dict[str, Any], Path]]:
    for path in sorted(folder.glob("annotations.jsonl")):
        yield from ((row, path) for row in read_lines(path))
        return
    for path in find_all(folder, "test-*.parquet", "data/test-*.parquet", "*.parquet", "data/*.parquet"):
        yield from ((row, path) for row in read_parquet_rows(path))
