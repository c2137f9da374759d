"""MMMU-Pro: 1,730 college questions with ten options, with four, and as screenshots."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from evals.benchmark import (
    LETTER_PRO,
    LETTERS,
    Benchmark,
    Grade,
    Judge,
    Profile,
    Question,
    grade_choice,
    list_options,
)
from evals.benchmarks.mmmu import place_numbered_images, read_python_list
from evals.files import as_lines, check_unique, find_all, need, need_words, picture, read_parquet_rows, without_pictures
from evals.matching.letters import parse_letter, parse_mmmu_pro
from llava_ray.errors import DataError

_DISCIPLINES = {
    "Art and Design": "Art Art_Theory Design Music",
    "Business": "Accounting Economics Finance Manage Marketing",
    "Science": "Biology Chemistry Geography Math Physics",
    "Health and Medicine": "Basic_Medical_Science Clinical_Medicine Diagnostics_and_Laboratory_Medicine Pharmacy "
    "Public_Health",
    "Humanities and Social Science": "History Literature Sociology Psychology",
    "Tech and Engineering": "Agriculture Architecture_and_Engineering Computer_Science Electronics Energy_and_Power "
    "Materials Mechanical_Engineering",
}
_DISCIPLINE_OF = {subject: name for name, subjects in _DISCIPLINES.items() for subject in subjects.split()}
_FEW = 4
_SEEN = (
    LETTER_PRO[1:] + " The last line of your response should be of the following format: 'Answer: $LETTER' (without "
    "quotes) where LETTER is one of options."
)


class MMMUPro(Benchmark):
    r"""Letters of up to ten options, averaged over questions (micro).

    Obtain: https://huggingface.co/datasets/MMMU/MMMU_Pro. The folder holds ``standard (10 options)/test-*.parquet``
    (images are inside). The authors' overall score is the mean of this setting and ``mmmu_pro_vision``. The prompt is
    their direct one; answers to their prompt of steps, with "Answer: X" in the last line, score by the same rules.

    llava and official: the one letter after the last "Answer:", else MMMU's rule; where the authors draw a letter at
    random, the answer is unparsed (expect 1/10 of those less). robust: ``matching.letters.parse_letter``.

    Robust, answer | truth | score (options gold, tin, iron, lead, zinc, silver, copper, nickel, cobalt, radium)::

        'J' | J | 1
        '(F) silver' | F | 1
        'Answer: H' | H | 1
        'It is a heavy metal.\n\nAnswer: D' | D | 1
        'The answer is (I).' | I | 1
        'zinc' | E | 1
        'C. iron' | C | 1
        'B' | A | 0
        'K' | A | unparsed
        'A or J' | A | unparsed
        "I'm sorry, I can't help with that." | I | unparsed
        '' | A | unparsed
    """

    name = "mmmu_pro"
    title = "MMMU-Pro (10 options)"
    max_new_tokens = 1024
    folder: ClassVar[str] = "standard (10 options)"
    setting: ClassVar[str] = "standard"
    """The setting's name in the authors' files of answers."""
    has_many_options: ClassVar[bool] = True

    def read(self, folder: Path) -> list[Question]:
        """Read the setting's files."""
        paths = find_all(folder, f"{self.folder}/test-*.parquet", "test-*.parquet")
        questions = [self._question(row, path) for path in paths for row in read_parquet_rows(path)]
        check_unique([question.id for question in questions], paths[0].parent, "question")
        if paths[0].parent.name != self.folder:
            self._check_setting(questions, paths[0])
        return questions

    def grade(self, question: Question, answer: str, profile: Profile, judge: Judge | None = None) -> Grade:
        """Grade the letter."""
        parse = parse_letter if profile == "robust" else parse_mmmu_pro
        return grade_choice(parse(answer, question.options), question.truths)

    def submit(self, questions: Sequence[Question], answers: Mapping[str, str]) -> dict[str, bytes]:
        """Build the file for the authors' evaluate.py: the rows without images, and the responses."""
        rows = [{**question.facts["row"], "response": answers.get(question.id, "")} for question in questions]
        return {f"llava_ray_{self.setting}_direct.jsonl": as_lines(rows)}

    def _check_setting(self, questions: Sequence[Question], path: Path) -> None:
        """Check by the number of options that files are of this setting. Raises DataError."""
        many = sum(len(question.options) > _FEW for question in questions)
        if (2 * many > len(questions)) != self.has_many_options:
            raise DataError(
                f"{path}: {many} of {len(questions)} questions have more than {_FEW} options; is this another setting "
                f"than {self.title}? Keep its files in {self.folder}/."
            )

    def _prompt(self, row: Mapping[str, Any], options: Sequence[str], path: Path) -> tuple[str, tuple[bytes, ...]]:
        return place_numbered_images(
            need_words(row, "question", str(row["id"]), path) + list_options(options) + LETTER_PRO, row, path
        )

    def _question(self, row: Mapping[str, Any], path: Path) -> Question:
        name = need_words(row, "id", str(row.get("id")), path)
        subject = need_words(row, "subject", name, path)
        options = tuple(map(str, read_python_list(need(row, "options", path), name, path)))
        truth = str(need(row, "answer", path))
        if truth not in tuple(LETTERS[: len(options)]):
            raise DataError(f"{path}: the answer to {name!r} is {truth!r}, none of its {len(options)} options.")
        prompt, images = self._prompt(row, options, path)
        if not images:
            raise DataError(f"{path}: question {name!r} has no image; obtain the file again.")
        categories = (subject, _DISCIPLINE_OF.get(subject, "other"))
        kept = {key: value for key, value in without_pictures(row).items() if not key.startswith("image")}
        return Question(name, prompt, images, (truth,), options, categories, name, facts={"row": kept})


class MMMUPro4(MMMUPro):
    """MMMU-Pro with four options; see ``MMMUPro``, whose rules hold.

    Obtain: https://huggingface.co/datasets/MMMU/MMMU_Pro. The folder holds ``standard (4 options)/test-*.parquet``.
    """

    name = "mmmu_pro_4"
    title = "MMMU-Pro (4 options)"
    folder = "standard (4 options)"
    has_many_options = False


class MMMUProVision(MMMUPro):
    """MMMU-Pro with question and options in the image; see ``MMMUPro``, whose rules hold.

    Obtain: https://huggingface.co/datasets/MMMU/MMMU_Pro. The folder holds ``vision/test-*.parquet``.
    """

    name = "mmmu_pro_vision"
    title = "MMMU-Pro (vision)"
    folder = "vision"
    setting = "vision"

    def _prompt(self, row: Mapping[str, Any], options: Sequence[str], path: Path) -> tuple[str, tuple[bytes, ...]]:
        return _SEEN, (picture(need(row, "image", path), path),)
