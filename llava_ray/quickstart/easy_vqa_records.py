"""easy-vqa as LLaVA records for training: images with their questions, and scenes described in words.

Whether a word of the question fits the scene, inverted by "not", is a parity: from a mix of both a small model learns
neither. The text-only curriculum has plain yes-or-no questions first, balanced, then the natural mix.
"""

import json
import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
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


def write_conversations(folder: Path, *, seed: int) -> Path:
    """Write every train question as a conversation of LLaVA JSON, in random order; return the file.

    Images are relative to ``image_folder("train")``. Raises DataError.
    """
    return _write_images(folder / "conversations.json", read_questions("train"), seed)


def write_open_questions(folder: Path, *, seed: int) -> Path:
    """Write every train question for a colour or a shape, as ``write_conversations`` does; return the file.

    For aligning a projector: a colour carries three bits about an image, a yes or no less than one.
    """
    return _write_images(folder / "open.json", [q for q in read_questions("train") if q.kind != YES_NO], seed)


def write_open_split(folder: Path, *, num_held_out_images: int, seed: int) -> tuple[Path, Path]:
    """Write the questions for a colour or a shape as two files that share no image; return both.

    For a sweep's training and held-out evaluation: the test split is reserved for the trial chosen in the end.
    """
    questions = [question for question in read_questions("train") if question.kind != YES_NO]
    images = sorted({question.image for question in questions})
    held_out = set(random.Random(seed).sample(images, num_held_out_images))
    training = [question for question in questions if question.image not in held_out]
    judged = [question for question in questions if question.image in held_out]
    return _write_images(folder / "open_train.json", training, seed), _write_images(
        folder / "open_held_out.json", judged, seed
    )


def _write_images(file: Path, questions: list[ShapeQuestion], seed: int) -> Path:
    """Write questions about images in random order."""
    random.Random(seed).shuffle(questions)
    records = [{"id": q.id, "image": q.image.name, "conversations": _turns("<image>", q)} for q in questions]
    return _write_records(file, records)


def write_words(folder: Path, *, num_first: int, num_natural: int, seed: int) -> Path:
    """Write ``num_first`` balanced, mostly plain yes-or-no questions, then ``num_natural`` of all kinds, as one file.

    Each is asked about a caption. Text-only LLaVA JSON, to be trained on in this order (``data.shuffle_window = 0``).
    Raises DataError.
    """
    rng = random.Random(seed)
    by_image: dict[Path, list[ShapeQuestion]] = defaultdict(list)
    for question in read_questions("train"):
        by_image[question.image].append(question)
    captions = {image: describe_scene(about) for image, about in by_image.items()}
    whole = {i for i, text in captions.items() if len({*COLOURS, *SHAPES} & {*text.split()}) == _COLOUR_AND_SHAPE}
    pool = [question for question in read_questions("train") if question.image in whole]
    chosen = _draw_plain(pool, rng)[:num_first] + rng.sample(pool, num_natural)
    records = [
        {"id": f"words-{number:05d}", "conversations": _turns(captions[question.image], question)}
        for number, question in enumerate(chosen)
    ]
    return _write_records(folder / "words.json", records)


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


def _turns(scene: str, question: ShapeQuestion) -> list[dict[str, str]]:
    """Return LLaVA's turns: the question about a scene, and its answer."""
    return [{"from": "human", "value": f"{scene}\n{question.question}"}, {"from": "gpt", "value": question.answer}]


def _write_records(file: Path, records: Sequence[Mapping[str, Any]]) -> Path:
    """Write LLaVA JSON and return the file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(records, indent=1), encoding="utf-8")
    return file
