"""The inputs of a review, from LLaVA-Bench's own files or a benchmark's folder, as items."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from evals.answers import read_content
from evals.benchmark import Question
from evals.benchmarks.mm_vet import grading_request
from evals.benchmarks.mmhal_bench import rating_request
from evals.benchmarks.object_halbench import object_request
from evals.catalogue import make_benchmark
from evals.files import check_complete, check_unique, need, need_text
from llava_ray.config.review import ReviewSection
from llava_ray.errors import DataError
from llava_ray.review.calls import Item
from llava_ray.review.rubric import ReviewKind, Rubric, build_default_rubric, read_rubric, read_rules
from pipelines.review_files import join_answers, read_contexts, read_question_rows

REFERENCE = "reference"
_OWN_KINDS: Mapping[str, ReviewKind] = {"mmhal_bench": "rating", "object_halbench": "objects"}
_OWN_WORDS: Mapping[ReviewKind, Callable[[Question, str], str]] = {
    "grade": grading_request,
    "rating": rating_request,
    "objects": object_request,
}
"""Requests in a benchmark's own words, of a question and an answer."""


@dataclass(frozen=True)
class Answered:
    """One model's answers, or the references, by question."""

    name: str
    texts: Mapping[str, str]
    ids: Mapping[str, str] = field(default_factory=dict)
    missing: tuple[str, ...] = ()


@dataclass(frozen=True)
class Inputs:
    """The items of a review, and missing answers."""

    questions: Sequence[Question]
    models: Sequence[str]
    items: Sequence[Item]
    missing: Mapping[str, tuple[str, ...]]
    """Questions without an answer, by model."""


def choose_rubric(review: ReviewSection) -> Rubric:
    """Load the rubric of the settings. Raises ConfigError."""
    kind = _kind_of(review)
    if review.rules:
        return read_rules(Path(review.rules))
    return read_rubric(Path(review.rubric), kind) if review.rubric else build_default_rubric(kind)


def _kind_of(review: ReviewSection) -> ReviewKind:
    """Return what is asked of the judge; benchmarks of single answers have a kind of their own."""
    own = _OWN_KINDS.get(str(review.benchmark))
    if own and review.mode not in ("pairwise", "single"):
        return own
    return "grade" if _is_graded(review) else "single" if review.mode == "single" else "pair"


def _is_graded(review: ReviewSection) -> bool:
    """Return whether answers are graded from 0 to 1."""
    return review.mode == "grade" or review.benchmark == "mm_vet"


def read_inputs(review: ReviewSection) -> Inputs:
    """Read all inputs and match them by question id. Raises DataError."""
    questions = _benchmark_questions(review) if review.benchmark else _question_files(review)
    questions = questions[: review.max_items]
    if _is_graded(review) and review.references:
        truths = _references(review, questions).texts
        questions = [replace(question, truths=(truths[question.id],)) for question in questions]
    models = _named_apart([_answers(Path(path), questions) for path in review.answers])
    matches: Sequence[tuple[Answered, ...]]
    if review.mode == "pairwise":
        matches = list(itertools.combinations(models, 2))
    elif _kind_of(review) != "pair":
        matches = [(model,) for model in models]
    else:
        matches = [(_references(review, questions), model) for model in models]
    items = [
        _item(question, match, review)
        for question in questions
        for match in matches
        if all(question.id in side.texts for side in match)
    ]
    if not items:
        raise DataError(f"no question has answers to review in {', '.join(review.answers)}; do the question ids agree?")
    names = [model.name for model in models]
    return Inputs(questions, names, items, {model.name: model.missing for model in models if model.missing})


def _benchmark_questions(review: ReviewSection) -> list[Question]:
    folder = Path(str(review.data))
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder}; evals/README.md says what {review.benchmark} needs in it.")
    return make_benchmark(str(review.benchmark)).read(folder)


def _question_files(review: ReviewSection) -> list[Question]:
    """Read LLaVA-Bench's own files."""
    path = Path(str(review.questions))
    contexts = _contexts(review)
    folder = Path(review.image_folder) if review.image_folder else None
    questions = []
    rows = read_question_rows(path, "questions (question_id, text)")
    check_unique([str(need(row, "question_id", path)) for row in rows], path, "question")
    for row in rows:
        name, image = str(row["question_id"]), str(row.get("image") or "")
        if contexts is not None and image not in contexts:
            raise DataError(f"{path}: question {name!r} is about {image!r}, which {review.context} does not describe.")
        facts = {"row": contexts[image]} if contexts is not None else {}
        images = (folder / image,) if folder and image else ()
        categories = (str(row.get("category") or "default"),)
        questions.append(
            Question(name, need_text(row, "text", path), images, categories=categories, cluster=image, facts=facts)
        )
    return questions


def _contexts(review: ReviewSection) -> dict[str, Any] | None:
    if review.context is None:
        return None
    return read_contexts(Path(review.context))


def _answers(path: Path, questions: Sequence[Question]) -> Answered:
    joined = join_answers(questions, path)
    rows = [row for row in read_content(path) if isinstance(row, dict)] if path.suffix == ".jsonl" else []
    ids = {
        str(row["question_id"]): str(row["answer_id"]) for row in rows if "question_id" in row and "answer_id" in row
    }
    name = next((str(row["model_id"]) for row in rows if row.get("model_id")), path.stem)
    return Answered(name, joined.answers, ids, joined.missing)


def _references(review: ReviewSection, questions: Sequence[Question]) -> Answered:
    if review.references:
        found = _answers(Path(review.references), questions)
        check_complete(found.missing, len(questions), f"{review.references} has no reference", "its question")
        return Answered(REFERENCE, found.texts, found.ids)
    return Answered(REFERENCE, {question.id: question.truths[0] for question in questions})


def _named_apart(models: Sequence[Answered]) -> list[Answered]:
    """Number models of the same name."""
    names = [model.name for model in models]
    return [
        model
        if names.count(model.name) == 1 and model.name != REFERENCE
        # "a | b" joins two names in the ledger, so that a name must not contain "|"
        else Answered(f"{model.name} ({number})", model.texts, model.ids, model.missing)
        for number, model in enumerate(models, start=1)
    ]


def _item(question: Question, match: Sequence[Answered], review: ReviewSection) -> Item:
    texts = tuple(side.texts[question.id] for side in match)
    own_words = _OWN_WORDS.get(_kind_of(review)) if review.rubric is None else None
    return Item(
        id=question.id,
        question=question.prompt,
        answers=texts,
        names=tuple(side.name for side in match),
        category=_rule_name(question, review),
        context=question.facts.get("row") or _told(question),
        image=_image(question),
        cluster=question.cluster,
        request=own_words(question, texts[0]) if own_words else None,
        answer_ids=tuple(side.ids.get(question.id, question.id) for side in match),
        categories=question.categories,
    )


def _told(question: Question) -> dict[str, Any] | None:
    return {"caption": [question.facts["context"]]} if "context" in question.facts else None


def _image(question: Question) -> Path | None:
    image = question.images[0] if question.images else None
    return image if isinstance(image, Path) else None


def _rule_name(question: Question, review: ReviewSection) -> str:
    """Return the rubric category of a question: LLaVA-Bench's own have a prefix in LLaVA's files."""
    category = question.categories[0] if question.categories else "default"
    in_sentences = "caption" in (question.facts.get("row") or {}) or review.benchmark == "llava_bench"
    return f"llava_bench_{category}" if in_sentences and not category.startswith("llava_bench_") else category
