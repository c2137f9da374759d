"""The easy-vqa data set: images of one coloured shape, and questions with exact answers, in a 3 MB package.

4,000 images and 38,575 questions to train on, 1,000 and 9,673 to test with (https://github.com/vzhou842/easy-VQA).
Three of four questions are answered yes or no, mostly as their wording suggests: ``blind_answers`` is the baseline that
a model has to beat to show that it uses the image.
"""

import functools
import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evals.benchmarks.custom import exact
from evals.files import as_lines
from llava_ray.errors import DataError

YES_NO, SHAPE, COLOUR = "yes/no", "shape", "colour"
SHAPES = ("circle", "rectangle", "triangle")
COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
KINDS = {"yes": YES_NO, "no": YES_NO} | dict.fromkeys(SHAPES, SHAPE) | dict.fromkeys(COLOURS, COLOUR)
NEGATIONS = ("not", "no")
POSITIONS = ("first", "second", "third")  # of a question in a conversation
_READERS = {"train": "get_train_questions", "test": "get_test_questions"}


@dataclass(frozen=True)
class ShapeQuestion:
    """One question; ``kind`` is YES_NO, SHAPE or COLOUR."""

    id: str
    image: Path
    question: str
    answer: str
    kind: str


@dataclass(frozen=True)
class Count:
    """A number of correct answers out of a number of questions."""

    num_correct: int
    num_questions: int

    @property
    def accuracy(self) -> float:
        """Return the share of correct answers, 0 to 1."""
        return self.num_correct / self.num_questions


@dataclass(frozen=True)
class Score:
    """Correct answers in total and by kind; ``missing`` are the ids without an answer, which count as wrong."""

    total: Count
    by_kind: Mapping[str, Count]
    missing: tuple[str, ...]


def image_folder(split: str) -> Path:
    """Return the folder of a split's images, ``NUMBER.png``. Raises DataError."""
    _check_split(split)
    return Path(_package().__file__).parent / "data" / split / "images"


def read_questions(split: str) -> list[ShapeQuestion]:
    """Return all questions of "train" or "test", in the package's order. Raises DataError."""
    return list(_read_questions(split, image_folder(split)))


def test_questions(num: int, seed: int) -> list[ShapeQuestion]:
    """Draw ``num`` questions of the test split, each kind with its share of the whole. Raises DataError."""
    pool = read_questions("test")
    _check_number(num, len(pool), "test questions")
    rng, drawn = random.Random(seed), []
    by_kind = {kind: [question for question in pool if question.kind == kind] for kind in (YES_NO, SHAPE, COLOUR)}
    exact = {kind: num * len(group) / len(pool) for kind, group in by_kind.items()}
    # Largest remainders: the questions lost by rounding down go to the kinds that lost most.
    losers = sorted(exact, key=lambda kind: int(exact[kind]) - exact[kind])[: num - sum(map(int, exact.values()))]
    for kind, group in by_kind.items():
        drawn += rng.sample(group, int(exact[kind]) + (kind in losers))
    return sorted(drawn, key=lambda question: question.id)


def train_questions(num: int, seed: int) -> list[ShapeQuestion]:
    """Draw ``num`` questions of the train split: half yes or no, a quarter each for a shape and a colour.

    Raises DataError.
    """
    pool = read_questions("train")
    rng, drawn = random.Random(seed), []
    for kind, share in ((YES_NO, 2), (SHAPE, 1), (COLOUR, 1)):
        group = [question for question in pool if question.kind == kind]
        _check_number(num * share // 4, len(group), f"train questions of the kind {kind}")
        drawn += rng.sample(group, num * share // 4)
    rng.shuffle(drawn)
    return drawn


def test_conversations(num: int, seed: int) -> list[tuple[ShapeQuestion, ...]]:
    """Draw ``num`` conversations of the test split, each three questions about one image. Raises DataError."""
    by_image: dict[Path, list[ShapeQuestion]] = defaultdict(list)
    for question in read_questions("test"):
        by_image[question.image].append(question)
    pool = [about for about in by_image.values() if len(about) >= len(POSITIONS)]
    _check_number(num, len(pool), "test conversations")
    rng = random.Random(seed)
    return [tuple(rng.sample(about, len(POSITIONS))) for about in rng.sample(pool, num)]


def describe_scene(known: Iterable[ShapeQuestion]) -> str:
    """Describe an image by what its questions and answers reveal: "a red circle", "a red shape", "a circle"."""
    shape, colour = "shape", ""
    for question in known:
        words = question.question.rstrip("?").split()
        # "is there not a red shape?" "no" reveals as much as a plain "yes"; "what" presupposes the words that it names.
        denied = "yes" if any(word in NEGATIONS for word in words) else "no"
        facts = [] if question.answer == denied else [*words, question.answer]
        shape = next((word for word in facts if word in SHAPES), shape)
        colour = next((word for word in facts if word in COLOURS), colour)
    return " ".join(word for word in ("a", colour, shape) if word)


def blind_answers() -> dict[str, str]:
    """Return the most frequent answer to each wording in the train split: the best guess without the image."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for question in read_questions("train"):
        counts[question.question][question.answer] += 1
    return {text: max(sorted(answers), key=lambda answer: answers[answer]) for text, answers in counts.items()}


def score_shape_answers(answers: Mapping[str, str], questions: Sequence[ShapeQuestion]) -> Score:
    """Score answers by question id: correct if equal, ignoring case, outer space and one final period.

    Answers to other questions are ignored. Raises DataError if there are no questions.
    """
    if not questions:
        raise DataError("there are no questions to score; expected at least one.")
    right = [question for question in questions if normalize_answer(answers.get(question.id, "")) == question.answer]
    num_right, num_by_kind = (Counter(question.kind for question in some) for some in (right, questions))
    return Score(
        total=Count(len(right), len(questions)),
        by_kind={kind: Count(num_right[kind], num) for kind, num in num_by_kind.items()},
        missing=tuple(question.id for question in questions if question.id not in answers),
    )


def compute_accuracies(conversations: Sequence[Sequence[ShapeQuestion]], answers: Mapping[str, str]) -> dict[str, Any]:
    """Compute the accuracies of the model and of the blind baseline: in total, by kind and by position."""
    frequent = blind_answers()
    questions = [question for conversation in conversations for question in conversation]
    guesses = {question.id: frequent.get(question.question, "") for question in questions}
    model, blind = (score_shape_answers(some, questions) for some in (answers, guesses))
    kinds = {kind: _beside_blind(part, blind.by_kind[kind]) for kind, part in model.by_kind.items()}
    positions = {}
    for name, asked in zip(POSITIONS, zip(*conversations, strict=True), strict=True):
        ours, theirs = (score_shape_answers(some, asked).total for some in (answers, guesses))
        positions[name] = _beside_blind(ours, theirs)
    return {
        "held_out_accuracy": model.total.accuracy,
        "blind_accuracy": blind.total.accuracy,
        "num_test_questions": len(questions),
        "missing_answers": len(model.missing),
        "by_kind": kinds,
        "by_position": positions,
    }


def write_benchmark(folder: Path, questions: Sequence[ShapeQuestion]) -> Path:
    """Write questions as a benchmark of your own (``custom``), scored like ``score_shape_answers``; return it."""
    rows = [
        {"id": q.id, "image": str(q.image), "question": q.question, "answer": q.answer, "category": q.kind}
        for q in questions
    ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "questions.jsonl").write_bytes(as_lines(rows))
    return folder


def normalize_answer(answer: str) -> str:
    """Return an answer in lower case, without space around it and without one final period."""
    return exact(answer)


def _beside_blind(model: Count, blind: Count) -> dict[str, Any]:
    return {"model": model.accuracy, "blind": blind.accuracy, "num_questions": model.num_questions}


@functools.cache
def _read_questions(split: str, folder: Path) -> tuple[ShapeQuestion, ...]:
    texts, answers, images = getattr(_package(), _READERS[split])()
    files = {image: folder / f"{image}.png" for image in images}
    return tuple(
        ShapeQuestion(f"{split}-{index:06d}", files[image], text, answer, _kind(answer))
        for index, (text, answer, image) in enumerate(zip(texts, answers, images, strict=True))
    )


def _kind(answer: str) -> str:
    if answer not in KINDS:
        raise DataError(f"easy-vqa answers {answer!r}; expected one of {', '.join(KINDS)}. Install easy-vqa 1.0 again.")
    return KINDS[answer]


def _check_split(split: str) -> None:
    if split not in _READERS:
        raise DataError(f"easy-vqa has no split {split!r}; expected one of {', '.join(_READERS)}.")


def _check_number(num: int, most: int, what: str) -> None:
    if not 1 <= num <= most:
        raise DataError(f"{num} {what} are requested, but easy-vqa has {most}; expected 1 to {most}.")


def _package() -> Any:
    try:
        import easy_vqa
    except ImportError as error:
        raise DataError(
            f"the data set easy-vqa cannot be imported ({error}): pip install 'llava_ray[quickstart]'"
        ) from error
    return easy_vqa
