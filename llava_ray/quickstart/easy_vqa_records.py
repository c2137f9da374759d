"""easy-vqa as LLaVA records for training: conversations about images, open questions, scenes described in words.

A conversation asks several questions about one image, as LLaVA's mix does: the model learns to answer with a history
before the question, and the image's tokens serve all of its questions. Whether a word of the question fits the scene,
inverted by "not", is a parity: from a mix of both a small model learns neither. The text-only curriculum has plain
questions first, balanced and alone, then the natural mix, alone and at last in conversations.
"""

import json
import random
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_ray.quickstart.easy_vqa import (
    COLOURS,
    NEGATIONS,
    SHAPES,
    YES_NO,
    ShapeQuestion,
    describe_scene,
    read_questions,
)

_NEGATED_SHARE = 0.1  # of the negated questions included in the first part
_COLOUR_AND_SHAPE = 2
_NUM_ASKED = (2, 5)  # fewest and most questions of a conversation; what is left of an image may be one


@dataclass(frozen=True)
class WordsCurriculum:
    """Numbers of questions about captions, in the order in which they are trained on."""

    num_plain: int = 4_800
    """Yes-or-no questions, each wording balanced, few negated, each alone; mixed with the next ones."""
    num_open: int = 1_200
    """Questions for a colour or a shape, each alone."""
    num_alone: int = 1_200
    """Questions of all kinds, each alone."""
    num_in_conversations: int = 7_500
    """Questions of all kinds, in conversations."""


_ALL_WORDS = WordsCurriculum()


def write_conversations(folder: Path, *, seed: int) -> Path:
    """Write every train question, in conversations about an image in random order, as LLaVA JSON; return the file.

    Images are relative to ``image_folder("train")``. Raises DataError.
    """
    by_image: dict[str, list[ShapeQuestion]] = defaultdict(list)
    for question in read_questions("train"):
        by_image[question.image.name].append(question)
    return _write_images(folder / "conversations.json", _draw_conversations(by_image, random.Random(seed)))


def write_open_questions(folder: Path, *, seed: int) -> Path:
    """Write every train question for a colour or a shape, each alone, in random order; return the file.

    For aligning a projector: a colour carries three bits about an image, a yes or no less than one.
    """
    return _write_alone(folder / "open.json", [q for q in read_questions("train") if q.kind != YES_NO], seed)


def write_open_split(folder: Path, *, num_held_out_images: int, seed: int) -> tuple[Path, Path]:
    """Write the questions for a colour or a shape, each alone, as two files that share no image; return both.

    For a sweep's training and held-out evaluation: the test split is reserved for the trial chosen in the end.
    """
    questions = [question for question in read_questions("train") if question.kind != YES_NO]
    images = sorted({question.image for question in questions})
    held_out = set(random.Random(seed).sample(images, num_held_out_images))
    training = [question for question in questions if question.image not in held_out]
    judged = [question for question in questions if question.image in held_out]
    return _write_alone(folder / "open_train.json", training, seed), _write_alone(
        folder / "open_held_out.json", judged, seed
    )


def _write_alone(file: Path, questions: list[ShapeQuestion], seed: int) -> Path:
    """Write questions about images, each alone, in random order."""
    random.Random(seed).shuffle(questions)
    return _write_images(file, [(question.image.name, [question]) for question in questions])


def _write_images(file: Path, conversations: Iterable[tuple[str, Sequence[ShapeQuestion]]]) -> Path:
    """Write images and the questions asked about each, under the id of the first."""
    records = [
        {"id": asked[0].id, "image": image, "conversations": _turns("<image>", asked)} for image, asked in conversations
    ]
    return _write_records(file, records)


def write_words(folder: Path, curriculum: WordsCurriculum = _ALL_WORDS, *, seed: int) -> Path:
    """Write questions about captions as one file of text-only LLaVA JSON; return it.

    To be trained on in this order (``data.shuffle_window = 0``). Raises DataError.
    """
    rng = random.Random(seed)
    by_image: dict[Path, list[ShapeQuestion]] = defaultdict(list)
    for question in read_questions("train"):
        by_image[question.image].append(question)
    captions = {image: describe_scene(about) for image, about in by_image.items()}
    whole = {i for i, text in captions.items() if len({*COLOURS, *SHAPES} & {*text.split()}) == _COLOUR_AND_SHAPE}
    pool = [question for question in read_questions("train") if question.image in whole]
    first = _draw_plain(pool, rng)[: curriculum.num_plain]
    first += rng.sample([question for question in pool if question.kind != YES_NO], curriculum.num_open)
    rng.shuffle(first)
    alone = [*first, *rng.sample(pool, curriculum.num_alone)]
    by_caption: dict[str, list[ShapeQuestion]] = defaultdict(list)
    for question in rng.sample(pool, curriculum.num_in_conversations):
        by_caption[captions[question.image]].append(question)
    scenes = [(captions[question.image], [question]) for question in alone] + _draw_conversations(by_caption, rng)
    records = [
        {"id": f"words-{number:05d}", "conversations": _turns(caption, asked)}
        for number, (caption, asked) in enumerate(scenes)
    ]
    return _write_records(folder / "words.json", records)


def _draw_conversations(
    by_scene: Mapping[str, Sequence[ShapeQuestion]], rng: random.Random
) -> list[tuple[str, Sequence[ShapeQuestion]]]:
    """Divide each scene's questions, in random order, into conversations of a random length; return all, shuffled."""
    drawn: list[tuple[str, Sequence[ShapeQuestion]]] = []
    for scene, questions in by_scene.items():
        left = rng.sample(questions, len(questions))
        while left:
            num = rng.randint(*_NUM_ASKED)
            drawn.append((scene, left[:num]))
            left = left[num:]
    rng.shuffle(drawn)
    return drawn


def _draw_plain(pool: Sequence[ShapeQuestion], rng: random.Random) -> list[ShapeQuestion]:
    """Draw yes-or-no questions, each wording balanced, with few negations, in random order."""
    groups: dict[str, dict[str, list[ShapeQuestion]]] = defaultdict(lambda: defaultdict(list))
    for question in pool:
        groups[question.question][question.answer].append(question)
    drawn: list[ShapeQuestion] = []
    for wording, by_answer in groups.items():
        num = min(len(by_answer["yes"]), len(by_answer["no"]))
        if any(word in NEGATIONS for word in wording.rstrip("?").split()):
            num = round(num * _NEGATED_SHARE)
        for answer in ("yes", "no"):
            drawn += rng.sample(by_answer[answer], num)
    rng.shuffle(drawn)
    return drawn


def _turns(scene: str, asked: Iterable[ShapeQuestion]) -> list[dict[str, str]]:
    """Return LLaVA's turns: the questions about a scene, which comes before the first, each with its answer."""
    turns = []
    for number, question in enumerate(asked):
        text = question.question if number else f"{scene}\n{question.question}"
        turns += [{"from": "human", "value": text}, {"from": "gpt", "value": question.answer}]
    return turns


def _write_records(file: Path, records: Sequence[Mapping[str, Any]]) -> Path:
    """Write LLaVA JSON and return the file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(records, indent=1), encoding="utf-8")
    return file
