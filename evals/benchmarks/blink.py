"""BLINK: fourteen perception tasks on one to four images (val: 1,901 questions)."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evals.benchmark import (
    FAILED,
    LETTERS,
    UNPARSED,
    Benchmark,
    Grade,
    Graded,
    Judge,
    Profile,
    Question,
    Total,
    by_category,
    grade_choice,
    percentage,
)
from evals.files import as_json, check_unique, find_all, need, need_words, picture, read_parquet_rows
from evals.judging import list_judge_requests
from evals.matching.letters import parse_letter
from llava_ray.errors import DataError

_MAX_IMAGES, _MAX_OPTIONS = 4, 5
_HIDDEN = "hidden"
_NONE = "(Z)"
_ID = re.compile(r"(val|test)_(.+)_\d+")
_VERDICT = re.compile(r"\(([A-Z])\)")
_REQUEST = (
    "A multiple-choice question about images was answered in free words. Reply with the option that the answer is "
    f"closest to, as its letter in parentheses, or with {_NONE} if the answer chooses none or refuses."
)


class Blink(Benchmark):
    """The mean of the accuracies of the tasks (macro); each question has two to five options.

    Obtain: https://huggingface.co/datasets/BLINK-Benchmark/BLINK. The folder holds ``TASK/val-*.parquet`` (images are
    inside). For the server: a folder with ``TASK/test-*.parquet`` alone.

    llava and official: "A" or "(A)" alone, else the only "(X)" that stands as a word in the last paragraph or in the
    whole answer; what that leaves is a judge's to read, whose reply is "(X)", or "(Z)" for no option. A reply of
    another form is a failure. robust: see ``evals.matching.letters.parse_letter``, without a judge.

    Robust, answer | truth | score (options point one, point two, point three, point four)::

        'A' | A | 1
        '(A)' | A | 1
        '(b)' | B | 1
        'point two' | B | 1
        'The answer is (C).' | C | 1
        '(D) point four' | D | 1
        'Point one is closer.' | A | 1
        '(B)' | A | 0
        '(A) or (B)' | A | unparsed
        "I'm sorry, but I can't assist with that." | A | unparsed
        '(Z)' | A | unparsed
        '' | A | unparsed
    """

    name = "blink"
    title = "BLINK"
    metric = "mean accuracy of the tasks"
    is_mean = False
    needs_judge = ("llava", "official")
    max_new_tokens = 1024

    def read(self, folder: Path) -> list[Question]:
        """Read the tasks' files of one split."""
        places = ("*/val-*.parquet", "val-*.parquet", "*/test-*.parquet", "test-*.parquet")
        paths = find_all(folder, *places)
        questions = [_question(row, path) for path in paths for row in read_parquet_rows(path)]
        check_unique([question.id for question in questions], folder, "question")
        return questions

    def grade(self, question: Question, answer: str, profile: Profile, judge: Judge | None = None) -> Grade:
        """Grade the letter, the judge's where the rule finds none. Raises DataError."""
        if profile == "robust":
            return grade_choice(parse_letter(answer, question.options), question.truths)
        if not answer.strip():
            return UNPARSED
        letter = parse_blink(answer, len(question.options))
        if letter is not None:
            return grade_choice(letter, question.truths)
        if judge is None:
            raise DataError(
                f"{self.title} under {profile} has a judge read answers such as that to {question.id!r}: use --reviews "
                "FILE or --profile robust"
            )
        return _grade_reply(judge(question.id, matching_request(question, answer)), question)

    def add_up(self, rows: Sequence[Graded], profile: Profile) -> Total:
        """Compute the mean of the tasks' accuracies, and the accuracy over all questions."""
        tasks = by_category(rows)
        found = [task.value for task in tasks.values() if task.value is not None]
        metrics = {"micro accuracy": percentage(rows).value, "tasks": float(len(tasks))}
        return Total(sum(found) / len(found) if found else None, metrics, tasks)

    def averaged(self, rows: Sequence[Graded], category: str | None = None) -> Sequence[Graded] | None:
        """Return the rows of a task, whose accuracy is a mean; the headline is a mean of means."""
        return None if category is None else rows

    def submit(self, questions: Sequence[Question], answers: Mapping[str, str]) -> dict[str, bytes]:
        """Build the authors' file of predictions, "(X)" by id; (Z) where an answer names no option."""
        predictions = {}
        for question in questions:
            said = answers.get(question.id, "")
            letter = parse_blink(said, len(question.options)) or parse_letter(said, question.options)
            predictions[question.id] = f"({letter})" if letter else _NONE
        split = questions[0].id.partition("_")[0] if questions else "val"
        requests = list_judge_requests(questions, answers, _needs_judge, matching_request)
        return {f"blink_{split}_predictions.json": as_json(predictions), **requests}


def parse_blink(answer: str, num_options: int) -> str | None:
    """Parse by the authors' rule before their judge: a letter alone, or the only "(X)" that is a word."""
    answer = answer.strip()
    alone = next((letter for letter in LETTERS[:_MAX_OPTIONS] if answer in (letter, f"({letter})")), None)
    if alone:
        return alone
    forms = {f"({letter})" for letter in LETTERS[:num_options]}
    named, last = forms & set(answer.split()), forms & set(answer.split("\n\n")[-1].split())
    chosen = last if len(last) == 1 else named
    return chosen.pop()[1] if len(chosen) == 1 else None


def matching_request(question: Question, answer: str) -> str:
    """Build the judge's request for the option that an answer means."""
    options = "\n".join(f"({letter}) {text}" for letter, text in zip(LETTERS, question.options, strict=False))
    return f"{_REQUEST}\n\nQuestion: {question.facts['question']}\nOptions:\n{options}\nAnswer: {answer}\nOption:"


def _needs_judge(question: Question, answer: str) -> bool:
    return parse_blink(answer, len(question.options)) is None


def _grade_reply(reply: str | None, question: Question) -> Grade:
    reply = (reply or "").strip()
    if reply.startswith(_NONE):
        return UNPARSED
    verdict = _VERDICT.fullmatch(reply)
    known = verdict is not None and verdict[1] in LETTERS[: len(question.options)]
    return grade_choice(verdict[1], question.truths) if verdict and known else FAILED


def _question(row: Mapping[str, Any], path: Path) -> Question:
    name, answer = str(need(row, "idx", path)), str(need(row, "answer", path)).strip()
    match = _ID.fullmatch(name)
    if match is None:
        raise DataError(f"{path}: the id {name!r} is none of BLINK's (SPLIT_TASK_NUMBER); is this the official file?")
    choices = need(row, "choices", path)
    options = tuple(choice for choice in choices if isinstance(choice, str)) if isinstance(choices, list) else ()
    letters = LETTERS[: len(options)]
    if not 1 < len(options) <= _MAX_OPTIONS:
        raise DataError(f"{path}: question {name!r} has {len(options)} options; expected 2 to {_MAX_OPTIONS}.")
    if answer != _HIDDEN and answer not in {f"({letter})" for letter in letters}:
        raise DataError(f"{path}: the answer to {name!r} is {answer!r}, none of its {len(options)} options.")
    cells = [row.get(f"image_{number}") for number in range(1, _MAX_IMAGES + 1)]
    images = tuple(picture(cell, path) for cell in cells if cell is not None)
    if not images:
        raise DataError(f"{path}: question {name!r} has no image; obtain the file again.")
    return Question(
        name,
        need_words(row, "prompt", name, path),
        images,
        () if answer == _HIDDEN else (answer[1],),
        options,
        (match[2],),
        name,
        facts={"question": need_words(row, "question", name, path)},
    )
