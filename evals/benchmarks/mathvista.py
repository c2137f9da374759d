"""MathVista: mathematics in images, 1,000 questions (testmini) with choices, numbers and lists as answers."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from evals.benchmark import FAILED, LETTERS, UNPARSED, Benchmark, Grade, Judge, Profile, Question, grade_choice
from evals.benchmarks.mathvista_files import read_problems
from evals.files import as_json
from evals.judging import list_judge_requests
from evals.matching.letters import parse_letter
from evals.matching.math_answers import (
    extract_plainly,
    extract_quickly,
    normalise_extraction,
    parse_list,
    parse_number,
)
from llava_ray.errors import DataError

_MAX_EXTRACTION = 2_000  # characters; a longer reply is no extraction
_REQUEST = (
    "Extract the final answer from a response to a question. Reply with nothing but the answer, in the form that the "
    "hint asks for: an option's letter, an integer, a floating-point number or a Python list."
)


class MathVista(Benchmark):
    """One mark a question, in all and by task, skill and the other labels that the authors report.

    Obtain: https://huggingface.co/datasets/AI4Math/MathVista. The folder holds ``testmini.json`` (or ``test.json``,
    without answers), ``images/`` and, if you like, the authors' ``query.json``; or ``data/testmini-*.parquet``.

    llava and official: a choice's text, an integer or a float alone is the extraction; of any other answer a judge
    extracts it (its reply, in reviews), and without reviews only the authors' quick rule, what stands quoted after
    "The answer is". Then the authors' normalisation: a choice by its letter or the nearest text, a number at the
    question's precision; it has to equal the answer. robust: without a judge. A choice: see
    ``evals.matching.letters.parse_letter``; a number: the only one stated last, at the precision; a list: the only one.

    Robust, answer | truth | score (options 135, 140, 145, 150 where the truth is a letter)::

        'C' | C | 1
        'The answer is (C) 145.' | C | 1
        '145' | C | 1
        'B' | C | 0
        '14' | 14 | 1
        'The number missing in the sequence is 14.' | 14 | 1
        'It is 15.' | 14 | 0
        '14.0' | 14 | 1
        '14.5' | 14 | 0
        'The fraction is 0.61' | 0.6 | 1
        'The answer is [2007, 2008].' | [2007, 2008] | 1
        '[2007, 2009]' | [2007, 2008] | 0
        'It is 5 or 6' | 6 | unparsed
        'I cannot tell.' | 14 | unparsed
        '' | 14 | unparsed
    """

    name = "mathvista"
    title = "MathVista"
    needs_judge = ("llava", "official")
    max_new_tokens = 1024

    def read(self, folder: Path) -> list[Question]:
        """Read the questions of one split."""
        return read_problems(folder)

    def grade(self, question: Question, answer: str, profile: Profile, judge: Judge | None = None) -> Grade:
        """Grade an answer, by the judge's extraction where the official rule needs one. Raises DataError."""
        if profile == "robust":
            return _grade_robustly(question, answer)
        if not answer.strip():
            return UNPARSED
        kind, precision = _form(question)
        extraction = extract_plainly(answer, kind, question.options)
        if extraction is None and judge is None:
            extraction = extract_quickly(answer)
            if extraction is None:
                raise DataError(
                    f"{self.title} under {profile} has a judge extract answers such as that to {question.id!r}: use "
                    "--reviews FILE or --profile robust"
                )
        elif extraction is None and judge is not None:
            extraction = judge(question.id, extraction_request(question, answer))
        if extraction is None or not 0 < len(extraction.strip()) <= _MAX_EXTRACTION:
            return FAILED
        parsed = normalise_extraction(extraction, kind, question.options, precision)
        return grade_choice(parsed, [_text_of(question, truth) for truth in question.truths])

    def submit(self, questions: Sequence[Question], answers: Mapping[str, str]) -> dict[str, bytes]:
        """Build the authors' output file, problems with query and response, and the responses alone."""
        responses = {question.id: answers.get(question.id, "") for question in questions}
        output = {
            question.id: {**question.facts["row"], "query": question.prompt, "response": responses[question.id]}
            for question in questions
        }
        split = "testmini" if any(question.truths for question in questions) else "test"
        return {
            f"output_{split}.json": as_json(output),
            f"output_{split}_response_only.json": as_json(responses),
            **list_judge_requests(questions, answers, _needs_judge, extraction_request),
        }


def extraction_request(question: Question, answer: str) -> str:
    """Build the judge's request for the answer within a response."""
    return f"{_REQUEST}\n\n{question.prompt}\n\nModel response: {answer}\n\nExtracted answer:"


def _needs_judge(question: Question, answer: str) -> bool:
    return extract_plainly(answer, _form(question)[0], question.options) is None


def _form(question: Question) -> tuple[str, int]:
    """Return the answer's type and precision: as the data say, or else as the right answer looks."""
    truth = question.truths[0] if question.truths else ""
    guess = "list" if truth.startswith("[") else "float" if "." in truth else "integer"
    kind = str(question.facts.get("answer_type", "text" if question.options else guess))
    return kind, int(question.facts.get("precision", len(truth.partition(".")[2])))


def _text_of(question: Question, truth: str) -> str:
    return question.options[LETTERS.index(truth)] if question.options else truth


def _grade_robustly(question: Question, answer: str) -> Grade:
    if question.options:
        return grade_choice(parse_letter(answer, question.options), question.truths)
    (kind, precision), truth = _form(question), question.truths[0]
    if kind == "list":
        numbers = parse_list(answer)
        return UNPARSED if numbers is None else Grade(float(numbers == parse_list(truth)), str(numbers))
    number = parse_number(answer)
    if number is None:
        return UNPARSED
    places = precision if kind == "float" else 0
    same = round(number, places) == round(float(truth), places) and (kind == "float" or number == float(truth))
    return Grade(float(same), f"{number:g}")
