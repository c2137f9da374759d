"""MMStar: 1,500 questions that need their image, in six abilities and eighteen axes."""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from evals.benchmark import LETTER, LETTERS, Benchmark, Grade, Judge, Profile, Question, grade_choice, list_options
from evals.benchmarks.spreadsheet import SheetCell, write_xlsx
from evals.files import check_unique, find, need, need_words, picture, read_parquet_rows
from evals.matching.letters import parse_letter
from evals.pictured_table import read_pictured_rows
from llava_ray.errors import DataError

_NOTHING = ("", "nan")
_PLACES = (("", 0), ("(", 1), ("option ", 7), ("the answer is ", 14))
"""Where the authors look for the letter: behind each start."""


class MMStar(Benchmark):
    """One letter; the score is the share of all questions, also by ability and axis.

    Obtain: https://huggingface.co/datasets/Lin-Chen/MMStar. The folder holds ``mmstar.parquet`` or ``MMStar.tsv``;
    images are inside. The authors' multi-modal gain is the difference (``compare``) of answers made with and without
    images; leakage needs those of the language model alone.

    llava and official: in lower case, the first character, or that after "(", "option " or "the answer is ", has to be
    the letter ("apple" is A). robust: see ``evals.matching.letters.parse_letter``.

    Robust, answer | truth | score (options apple, pear, plum, fig)::

        'A' | A | 1
        'a' | A | 1
        '(B)' | B | 1
        'B: pear' | B | 1
        'The answer is C.' | C | 1
        'Option D' | D | 1
        'plum' | C | 1
        'It is an apple.' | A | 1
        'C' | A | 0
        'A or B' | A | unparsed
        'Beautiful' | B | unparsed
        '' | A | unparsed
    """

    name = "mmstar"
    title = "MMStar"

    def read(self, folder: Path) -> list[Question]:
        """Read the table or the Parquet file."""
        path = find(folder, "MMStar*.tsv", "mmstar*.parquet", "*.parquet", "data/*.parquet", "*.tsv")
        questions = [_question(row, image, path) for row, image in _rows(path)]
        check_unique([question.id for question in questions], path, "question")
        return questions

    def grade(self, question: Question, answer: str, profile: Profile, judge: Judge | None = None) -> Grade:
        """Grade the letter."""
        if profile == "robust":
            return grade_choice(parse_letter(answer, question.options), question.truths)
        return grade_choice(parse_mmstar(answer, len(question.options)), question.truths)

    def submit(self, questions: Sequence[Question], answers: Mapping[str, str]) -> dict[str, bytes]:
        """Build the authors' table: the columns without the image, and the prediction."""
        table: list[list[SheetCell]] = []
        for question in questions:
            row: Mapping[str, str] = question.facts["row"]
            table = table or [[*row, "prediction"]]
            table.append([*row.values(), answers.get(question.id, "")])
        return {"MMStar.xlsx": write_xlsx(table)}


def parse_mmstar(answer: str, num_options: int) -> str | None:
    """Parse by the authors' rule: the letter in front, or behind "(", "option " or "the answer is "."""
    text = answer.lower().strip().replace("\n", " ")
    letters = [
        text[place].upper()
        for start, place in _PLACES
        if text.startswith(start) and len(text) > place and text[place].upper() in LETTERS[:num_options]
    ]
    return letters[-1] if letters else None


def _rows(path: Path) -> Iterator[tuple[dict[str, Any], bytes | None]]:
    if path.suffix == ".tsv":
        yield from read_pictured_rows(path)
        return
    for row in read_parquet_rows(path):
        image = picture(need(row, "image", path), path)
        yield {key: value for key, value in row.items() if isinstance(value, str | int)}, image


def _question(row: Mapping[str, Any], image: bytes | None, path: Path) -> Question:
    name = str(need(row, "index", path))
    text = need_words(row, "question", name, path)
    truth = str(need(row, "answer", path)).strip().upper()
    listed = [str(row[letter]) for letter in LETTERS if str(row.get(letter) or "").strip().lower() not in _NOTHING]
    options = tuple(listed or _options_within(text) or "ABCD")
    if truth not in tuple(LETTERS[: len(options)]):
        raise DataError(f"{path}: the answer to question {name!r} is {truth!r}, none of its {len(options)} options.")
    if not name.isdigit():
        raise DataError(f"{path}: the index {name!r} is no number; obtain the file again.")
    if image is None:
        raise DataError(f"{path}: question {name!r} has no image; obtain the file again.")
    ability, axis = (need_words(row, key, name, path) for key in ("category", "l2_category"))
    prompt = text + (list_options(listed) if listed else "") + LETTER
    return Question(
        name, prompt, (image,), (truth,), options, (ability, f"{ability} ({axis})"), name, facts={"row": row}
    )


def _options_within(text: str) -> list[str]:
    """Return the options at the end of a question, "Options: A: cat, B: dog"; none where they are not in order."""
    _, mark, tail = text.rpartition("Options:")
    tail = f", {tail.strip()}"
    starts: list[re.Match[str]] = []
    for letter in LETTERS if mark else "":
        found = re.compile(rf"[,\s]\s*{letter}[:.]\s").search(tail, starts[-1].end() - 1 if starts else 0)
        if found is None:
            break
        starts.append(found)
    ends = [start.start() for start in starts[1:]] + [len(tail)] * bool(starts)
    return [tail[start.end() : end].strip(" ,\n") for start, end in zip(starts, ends, strict=True)]
