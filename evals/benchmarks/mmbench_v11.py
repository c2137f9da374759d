"""MMBench v1.1: the revised questions of MMBench, in English and Chinese."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from evals.benchmark import FAILED, LETTER_CN, UNPARSED, Grade, Judge, Profile, Question, grade_choice
from evals.benchmarks.mmbench import ROTATION, MMBench
from evals.benchmarks.spreadsheet import SheetCell, write_xlsx
from evals.files import list_first, read_table
from evals.judging import list_judge_requests
from evals.matching.letters import parse_mmbench
from llava_ray.errors import DataError

_REQUEST = (
    "A multiple-choice question was answered in free words. Reply with the letter of the option that the answer means, "
    "or with Z if it means none of them."
)


class MMBenchV11(MMBench):
    """CircularEval over version 1.1; the robust rule and its vectors are those of ``MMBench``.

    Obtain: https://github.com/open-compass/MMBench. The folder holds ``MMBench_DEV_EN_V11.tsv`` (or the test split,
    whose answers only the server has). A rotation's image cell may be the index of the row with the image. A table
    that lacks rotations of a question is refused.

    llava and official: MMBench's rule; with reviews, what it cannot read is the judge's letter, as in the authors'
    toolkit with a language model. Without reviews such an answer is unparsed, as in its exact matching.
    """

    name = "mmbench_v11"
    title = "MMBench v1.1"
    patterns: ClassVar[tuple[str, ...]] = (
        "MMBench_DEV_EN_V11*.tsv",
        "MMBench_TEST_EN_V11*.tsv",
        "*EN_V11*.tsv",
        "*en_v11*.tsv",
        "*.tsv",
    )
    version = "V11"

    def read(self, folder: Path) -> list[Question]:
        """Read the table, with all rotations of each question. Raises DataError."""
        questions = super().read(folder)
        groups: dict[str, list[Question]] = {}
        for question in questions:
            groups.setdefault(question.group, []).append(question)
        lacking = [name for name, some in groups.items() if not _has_all_rotations(some)]
        if lacking:
            raise DataError(
                f"{self._table} lacks rotations of questions {list_first(lacking)}; obtain the table again."
            )
        return questions

    def grade(self, question: Question, answer: str, profile: Profile, judge: Judge | None = None) -> Grade:
        """Grade the letter of one rotation, the judge's where there are reviews and the rule finds none."""
        grade = super().grade(question, answer, profile)
        if profile == "robust" or judge is None or grade.state != "unparsed":
            return grade
        return _grade_reply(judge(question.id, option_request(question, answer)), question)

    def submit(self, questions: Sequence[Question], answers: Mapping[str, str]) -> dict[str, bytes]:
        """Build the server's table: all columns but the image, and the prediction."""
        if self._table is None:
            return {}
        table: list[list[SheetCell]] = []
        for row in read_table(self._table):
            row.pop("image", None)
            index = int(row.pop("index"))
            table = table or [["index", *row, "prediction"]]
            table.append([index, *row.values(), answers.get(str(index), "")])
        requests = list_judge_requests(questions, answers, _needs_judge, option_request)
        return {f"{self._table.stem}.xlsx": write_xlsx(table), **requests}


class MMBenchV11CN(MMBenchV11):
    """MMBench v1.1 in Chinese; see ``MMBenchV11``, whose rules hold.

    Obtain: https://github.com/open-compass/MMBench. The folder holds ``MMBench_DEV_CN_V11.tsv``.
    """

    name = "mmbench_v11_cn"
    title = "MMBench-CN v1.1"
    patterns = ("MMBench_DEV_CN_V11*.tsv", "MMBench_TEST_CN_V11*.tsv", "*CN_V11*.tsv", "*cn_v11*.tsv")
    instruction = LETTER_CN


def option_request(question: Question, answer: str) -> str:
    """Build the judge's request for the option that an answer means."""
    return f"{_REQUEST}\n\n{question.prompt}\n\nAnswer: {answer}\nLetter:"


def _needs_judge(question: Question, answer: str) -> bool:
    return parse_mmbench(answer, question.options) is None


def _grade_reply(reply: str | None, question: Question) -> Grade:
    """Grade a judge's letter: Z is no option, and any other reply without one letter is a failure."""
    if reply is None:
        return FAILED
    letter = parse_mmbench(reply, question.options)
    if letter is not None:
        return grade_choice(letter, question.truths)
    return UNPARSED if reply.strip(" \n.()") == "Z" else FAILED


def _has_all_rotations(rows: Sequence[Question]) -> bool:
    """Return whether rows are the rotations 0, 1, … of a question, at least as many as its options."""
    turns = sorted(int(row.id) // ROTATION for row in rows)
    return turns == list(range(len(rows))) and len(rows) >= max(len(row.options) for row in rows)
