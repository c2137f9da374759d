"""Answers files, ours and LLaVA's, and their join to questions by id, never by line."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evals.benchmark import Question
from evals.files import index_by_id, read_json_value, read_lines, read_utf8
from llava_ray.errors import DataError
from llava_ray.invocation import command

_IDS = ("question_id", "questionId", "id", "image", "image_id")
_TEXTS = ("text", "answer", "prediction", "response", "model_answer", "caption")


@dataclass(frozen=True)
class Answer:
    """One line of an answers file; ``prompt`` is the question, where the line has it."""

    id: str
    text: str
    prompt: str = ""
    category: str = ""


@dataclass(frozen=True)
class JoinedAnswers:
    """Answers by the ids of their questions, and mismatches."""

    answers: Mapping[str, str]
    missing: tuple[str, ...]
    """Questions without an answer."""
    duplicate: tuple[str, ...]
    """Questions with several answers, once for each surplus answer; the first in the file counts."""
    conflicting: tuple[str, ...]
    """The duplicates with different answers."""
    extra: tuple[str, ...]
    """Answers without a question, or with an ambiguous one."""


class RecordedJudge:
    """A judge with recorded replies, by question id."""

    def __init__(self, replies: Mapping[str, str]) -> None:
        """Initialise with the replies."""
        self.replies = replies

    def __call__(self, question_id: str, request: str) -> str | None:
        """Return the recorded reply, or None."""
        return self.replies.get(question_id)


def read_answers(path: Path) -> list[Answer]:
    """Read JSON lines, a JSON list of such rows, or a JSON object of texts by id. Raises DataError.

    A row's id is question_id (questionId, id, image, image_id), its answer text (answer, prediction, and what benchmark
    authors' own scripts read: response, model_answer, caption; also CHAIR's object with "imgToEval").
    """
    if not path.exists():
        raise DataError(
            f"there is no answers file {path}; make one with {command('evaluate', 'run')}, or give LLaVA's."
        )
    content = read_content(path)
    if isinstance(content, dict) and isinstance(content.get("imgToEval"), dict):
        content = list(content["imgToEval"].values())
    if isinstance(content, dict):
        return [Answer(str(name), _text_of(text, name, path)) for name, text in content.items()]
    if not isinstance(content, list):
        raise DataError(f"{path} holds {content!r:.80}; expected rows with question_id and text.")
    return [_answer(row, path) for row in content]


def read_reviews(path: Path) -> RecordedJudge:
    """Read a judge's replies: JSON lines with question_id and content, as LLaVA's review scripts write them.

    Raises DataError for two different replies to one question.
    """
    replies = []
    for row in read_lines(path):
        if not isinstance(row, dict) or "question_id" not in row or not isinstance(row.get("content"), str):
            raise DataError(f"{path}: a row lacks question_id or content (the judge's reply); see evals/README.md")
        replies.append((str(row["question_id"]), row["content"]))
    return RecordedJudge(index_by_id(replies, path, "reviews"))


def match_answers(questions: Sequence[Question], answers: Sequence[Answer]) -> JoinedAnswers:
    """Match answers to questions by id or alias. Raises DataError if two questions have the same id."""
    index = _index(questions)
    found: dict[str, list[str]] = defaultdict(list)
    extra = []
    for answer in answers:
        name = next((index[key] for key in _keys(answer) if key in index), None)
        if name is None:
            extra.append(answer.id)
        else:
            found[name].append(answer.text)
    names = [question.id for question in questions]
    return JoinedAnswers(
        {name: found[name][0] for name in names if name in found},
        tuple(name for name in names if name not in found),
        tuple(name for name in names for _ in found.get(name, [])[1:]),
        tuple(name for name in names if len(set(found.get(name, []))) > 1),
        tuple(extra),
    )


def _index(questions: Sequence[Question]) -> dict[str, str]:
    index: dict[str, str] = {}
    for question in questions:
        if question.id in index:
            raise DataError(f"two questions have the id {question.id!r}: leave one of them in the questions' file.")
        index[question.id] = question.id
    claims: dict[str, set[str]] = defaultdict(set)
    for question in questions:
        for alias in question.aliases:
            claims[alias].add(question.id)
    # An ambiguous alias is dropped; ids take precedence over aliases.
    return {alias: next(iter(ids)) for alias, ids in claims.items() if len(ids) == 1} | index


def _keys(answer: Answer) -> list[str]:
    lines = [line.strip().lower() for line in answer.prompt.split("\n") if line.strip()]
    with_category = [f"{answer.category}/{answer.id}"] if answer.category else []
    return [*with_category, answer.id, *(f"{answer.id}\n{line}" for line in [*lines, " ".join(lines)])]


def read_content(path: Path) -> Any:
    """Read an answers file's rows, or its texts by id. Raises DataError."""
    text = read_utf8(path).lstrip()
    if path.suffix == ".json" or text.startswith("["):
        return read_json_value(path, "repair it")
    return read_lines(path)


def _answer(row: Any, path: Path) -> Answer:
    keys = row.keys() if isinstance(row, dict) else ()
    name, text = (next((key for key in wanted if key in keys), None) for wanted in (_IDS, _TEXTS))
    if name is None or text is None:
        raise DataError(
            f"{path}: a row has {', '.join(keys) or repr(row)}; expected question_id and text (LLaVA's and our form)"
        )
    category = row.get("category")
    return Answer(
        str(row[name]),
        _text_of(row[text], row[name], path),
        str(row.get("prompt") or ""),
        category if isinstance(category, str) else "",
    )


def _text_of(value: Any, name: Any, path: Path) -> str:
    """Return an answer's text. Raises DataError for lists and objects."""
    if isinstance(value, list | dict):
        raise DataError(f"{path}: the answer to {name!r} is no text but {value!r:.80}.")
    return "" if value is None else str(value)
