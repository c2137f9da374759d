"""Your own benchmark: a file of questions and answers, with a rule of your choice."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from evals.benchmark import (
    LETTER,
    LETTERS,
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
from evals.benchmarks.gqa import plain_words
from evals.files import find, need, read_lines
from evals.matching.letters import parse_letter
from evals.matching.numbers import anls_robust, grade_numbers
from evals.matching.plain_text import to_plain_text, without_label
from evals.matching.vqa_text import robust_accuracy
from evals.matching.yes_no import parse_yes_no
from llava_ray.errors import DataError

_INSTRUCTIONS = {"short": SHORT, "letter": LETTER, "none": ""}


class Custom(Benchmark):
    r"""Each line of ``questions.jsonl`` is a question with its answers and the rule to grade by.

    Obtain: write it. The folder holds ``questions.jsonl`` with lines ``{"id", "image" or "images", "question", "answer"
    or "answers", "options", "category", "cluster", "rule", "instruction"}``; all but id, question and answer may be
    left out. Images lie under the folder. ``rule``: exact (default), words, vqa, letter (default with options), yes_no,
    number, anls. ``instruction``: none (default), short, or letter (default with options). The answer to a question
    with options is a letter or an option's text.

    All profiles are the same here. exact is equality of plain texts but for case and one final period.

    Robust, answer | truth | score (rule exact)::

        'red' | red | 1
        'Red' | red | 1
        ' Red.\n' | red | 1
        'red .' | red | 1
        'red..' | red | 0
        'reddish' | red | 0
        'dark red' | red | 0
        'yes' | Yes | 1
        'No.' | no | 1
        'two' | 2 | 0
        '' | red | unparsed
    """

    name = "custom"
    title = "Custom"

    def read(self, folder: Path) -> list[Question]:
        """Read the file. Raises DataError for an unknown rule or instruction."""
        path = find(folder, "questions.jsonl", "*.jsonl")
        return [_question(row, folder, path) for row in read_lines(path)]

    def grade(self, question: Question, answer: str, profile: Profile, judge: Judge | None = None) -> Grade:
        """Grade by the question's rule."""
        if not to_plain_text(answer):
            return UNPARSED
        return _RULES[question.facts["rule"]](question, answer)


def exact(text: str) -> str:
    """Return a plain text in lower case, without one final period."""
    return without_label(to_plain_text(text)).lower().removesuffix(".").rstrip()


def _by_text(normalise: Callable[[str], str]) -> Callable[[Question, str], Grade]:
    def grade(question: Question, answer: str) -> Grade:
        return grade_choice(normalise(answer) or None, [normalise(truth) for truth in question.truths])

    return grade


def _by_score(score: Callable[[str, Sequence[str]], float]) -> Callable[[Question, str], Grade]:
    return lambda question, answer: Grade(score(answer, question.truths), answer.strip())


def _number(question: Question, answer: str) -> Grade:
    return grade_numbers(answer, question.truths)


def _letter(question: Question, answer: str) -> Grade:
    return grade_choice(parse_letter(answer, question.options), question.truths)


def _yes_no(question: Question, answer: str) -> Grade:
    return grade_choice(parse_yes_no(answer), [truth.lower() for truth in question.truths])


_RULES: Mapping[str, Callable[[Question, str], Grade]] = {
    "exact": _by_text(exact),
    "words": _by_text(plain_words),
    "vqa": _by_score(robust_accuracy),
    "letter": _letter,
    "yes_no": _yes_no,
    "number": _number,
    "anls": _by_score(anls_robust),
}


def _question(row: Mapping[str, Any], folder: Path, path: Path) -> Question:
    name, text = str(need(row, "id", path)), need(row, "question", path)
    options = tuple(map(str, row.get("options") or ()))
    rule, instruction = row.get("rule") or ("letter" if options else "exact"), row.get("instruction")
    instruction = instruction or ("letter" if options else "none")
    for value, known, what in ((rule, _RULES, "rule"), (instruction, _INSTRUCTIONS, "instruction")):
        if value not in known:
            raise DataError(f"{path}: question {name!r} has the {what} {value!r}; expected one of {', '.join(known)}")
    truths = [str(truth) for truth in (row["answers"] if "answers" in row else [need(row, "answer", path)])]
    if options:
        truths = [LETTERS[options.index(truth)] if truth in options else truth for truth in truths]
    files = row.get("images") or ([row["image"]] if row.get("image") else [])
    images = tuple(folder / str(file) for file in files)
    return Question(
        name,
        text + list_options(options) + _INSTRUCTIONS[instruction],
        images,
        tuple(truths),
        options,
        (str(row["category"]),) if row.get("category") else (),
        str(row.get("cluster") or (files[0] if files else name)),
        facts={"rule": rule},
    )
