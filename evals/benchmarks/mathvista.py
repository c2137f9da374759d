"""MathVista: mathematics in images, 1,000 questions (testmini) with choices, numbers and lists as answers."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from evals.benchmark import FAILED, LETTERS, UNPARSED, Benchmark, Grade, Judge, Profile, Question, grade_choice
from evals.files import (
    as_json,
    check_complete,
    check_unique,
    find_all,
    need,
    picture,
    read_json_value,
    read_parquet_rows,
)
from evals.matching.letters import parse_letter
from evals.matching.math_answers import extract_plainly, normalise_extraction, parse_list, parse_number
from llava_ray.errors import DataError

_HINTS = {
    "text": "Please answer the question and provide the correct option letter, e.g., A, B, C, D, at the end.",
    "integer": "Please answer the question requiring an integer answer and provide the final value, e.g., 1, 2, 3, at "
    "the end.",
    "list": "Please answer the question requiring a Python list as an answer and provide the final list, e.g., "
    "[1, 2, 3], [1.2, 1.3, 1.4], at the end.",
    "float": "Please answer the question requiring a floating-point number with {} and provide the final value, e.g., "
    "{}, at the end.",
}
_DECIMALS = {1: ("one decimal place", "1.2, 1.3, 1.4"), 2: ("two decimal places", "1.23, 1.34, 1.45")}
_CHOICE, _FREE = "multi_choice", "free_form"
_KEYS = ("language", "source", "category", "task", "context", "grade")
_PLACES = ("testmini.json", "test.json") + tuple(
    f"{folder}{name}.parquet" for name in ("testmini-*", "test-*", "*") for folder in ("data/", "")
)
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
    extracts it (its reply, in reviews). Then the authors' normalisation: a choice by its letter or the nearest text, a
    number at the question's precision; it has to equal the answer. robust: without a judge. A choice: see
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
        paths = find_all(folder, *_PLACES)
        rows = [(row, path) for path in paths for row in _rows(path)]
        names = [str(row["pid"]) for row, _ in rows]
        check_unique(names, paths[0], "question")
        queries = _queries(folder, names)
        return [_question(row, queries, folder, path) for row, path in rows]

    def grade(self, question: Question, answer: str, profile: Profile, judge: Judge | None = None) -> Grade:
        """Grade an answer, by the judge's extraction where the official rule needs one. Raises DataError."""
        if profile == "robust":
            return _grade_robustly(question, answer)
        if not answer.strip():
            return UNPARSED
        kind, precision = _form(question)
        extraction = extract_plainly(answer, kind, question.options)
        if extraction is None:
            if judge is None:
                raise DataError(
                    f"{self.title} under {profile} has a judge extract answers such as that to {question.id!r}: use "
                    "--reviews FILE or --profile robust"
                )
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
        }


def extraction_request(question: Question, answer: str) -> str:
    """Build the judge's request for the answer within a response."""
    return f"{_REQUEST}\n\n{question.prompt}\n\nModel response: {answer}\n\nExtracted answer:"


def _form(question: Question) -> tuple[str, int]:
    """Return the answer's type and precision: as the data say, or else as the right answer looks."""
    truth = question.truths[0]
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


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    if path.suffix != ".json":
        for row in read_parquet_rows(path):
            need(row, "pid", path)
            yield row
        return
    content = read_json_value(path)
    if not isinstance(content, dict):
        raise DataError(f"{path} holds no object of problems by pid; is this the official file?")
    for name, row in content.items():
        if str(need(row, "pid", path)) != name:
            raise DataError(f"{path}: the problem {name!r} has the pid {row['pid']!r}; obtain the file again.")
        yield row


def _queries(folder: Path, names: Sequence[str]) -> Mapping[str, str]:
    """Return the authors' prompts, if their file is there. Raises DataError if it lacks some."""
    path = folder / "query.json"
    if not path.exists():
        return {}
    found = read_json_value(path)
    if not isinstance(found, dict):
        raise DataError(f"{path} holds no object of queries by pid; obtain it again, or leave it out.")
    check_complete(
        [name for name in names if not isinstance(found.get(name), str)], len(names), f"{path} has no query", "the file"
    )
    return found


def _question(row: Mapping[str, Any], queries: Mapping[str, str], folder: Path, path: Path) -> Question:
    name, kind = str(row["pid"]), str(need(row, "answer_type", path))
    _check_form(row, name, path)
    choices = tuple(map(str, row.get("choices") or ())) if row["question_type"] == _CHOICE else ()
    query = queries.get(name) or row.get("query") or _build_query(row, choices, kind)
    image = row.get("decoded_image")
    labels = need(row, "metadata", path)
    categories = [f"{key}: {labels[key]}" for key in _KEYS if labels.get(key)]
    categories += [f"skill: {skill}" for skill in labels.get("skills") or ()]
    return Question(
        name,
        str(query),
        (picture(image, path) if image is not None else folder / str(need(row, "image", path)),),
        _truths(row, choices, name, path),
        choices,
        (f"question type: {row['question_type']}", f"answer type: {kind}", *categories),
        str(row.get("image") or name),
        facts={
            "answer_type": kind,
            "precision": int(row["precision"]) if kind == "float" else 0,
            "row": {key: value for key, value in row.items() if key != "decoded_image"},
        },
    )


def _check_form(row: Mapping[str, Any], name: str, path: Path) -> None:
    """Check that a problem's type, choices and precision fit together. Raises DataError."""
    kind, form = row["answer_type"], need(row, "question_type", path)
    if form not in (_CHOICE, _FREE) or kind not in _HINTS or (form == _CHOICE) != (kind == "text"):
        fault = f"the question type {form!r} with the answer type {kind!r}"
    elif form == _CHOICE and not row.get("choices"):
        fault = "choices to make, but none to choose from"
    elif kind == "float" and not _is_count(row.get("precision")):
        fault = f"a float as its answer, but the precision {row.get('precision')!r}"
    else:
        return
    raise DataError(f"{path}: problem {name!r} has {fault}; obtain the file again.")


def _is_count(value: Any) -> bool:
    return isinstance(value, int | float) and value in range(1, 16)


def _is_of(kind: str, answer: str) -> bool:
    """Return whether a right answer has the form of its type."""
    if kind == "list":
        return parse_list(answer) is not None
    return normalise_extraction(answer, kind, (), 15) is not None


def _truths(row: Mapping[str, Any], choices: Sequence[str], name: str, path: Path) -> tuple[str, ...]:
    """Return the right answer, a letter where there are choices; none in the test split. Raises DataError."""
    answer = str(row.get("answer") or "")
    if not answer:
        return ()
    if not choices:
        if not _is_of(row["answer_type"], answer):
            raise DataError(f"{path}: the answer to problem {name!r} is {answer!r}, no {row['answer_type']}.")
        return (answer,)
    letters = tuple(letter for letter, choice in zip(LETTERS, choices, strict=False) if choice == answer)
    if not letters:
        raise DataError(f"{path}: the answer to problem {name!r} is {answer!r}, none of its choices.")
    return letters


def _build_query(row: Mapping[str, Any], choices: Sequence[str], kind: str) -> str:
    """Build the authors' prompt without examples: a hint, the question with its unit, and the choices."""
    precision = int(row["precision"]) if kind == "float" else 0
    places = _DECIMALS.get(precision, (f"{precision} decimal places", "1.2, 1.3, 1.4"))
    lines = [f"Hint: {_HINTS[kind].format(*places) if kind == 'float' else _HINTS[kind]}"]
    lines.append(f"Question: {row['question']}" + (f" (Unit: {row['unit']})" if row.get("unit") else ""))
    if choices:
        lines += ["Choices:", *(f"({letter}) {choice}" for letter, choice in zip(LETTERS, choices, strict=False))]
    return "\n".join(lines)
