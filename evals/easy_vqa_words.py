"""easy-vqa told in words: the train questions about captions instead of images, as a curriculum for a language model.

Whether a word of the question fits the scene, turned round by "not", is a parity: from a mix of both a small model
learns neither. So plain yes-or-no questions come first, as often yes as no, and then the natural mix.
"""

import json
import random
from collections import defaultdict
from pathlib import Path

from evals.easy_vqa import NEGATIONS, Question, describe, questions

NEGATED_SHARE = 0.1  # of the negated questions that come among the first
WORDS_OF_A_WHOLE_CAPTION = 3


def write_words(folder: Path, *, num_first: int, num_natural: int, seed: int) -> Path:
    """Write ``num_first`` balanced, mostly plain yes-or-no questions, then ``num_natural`` of all kinds, as one file.

    Text-only LLaVA JSON, to be learnt in this order (``data.shuffle_window = 0``). Raises DataError.
    """
    rng = random.Random(seed)
    by_image: dict[Path, list[Question]] = defaultdict(list)
    for question in questions("train"):
        by_image[question.image].append(question)
    captions = {image: describe(asked) for image, asked in by_image.items()}
    pool = [q for q in questions("train") if len(captions[q.image].split()) == WORDS_OF_A_WHOLE_CAPTION]
    chosen = draw_plain(pool, rng)[:num_first] + rng.sample(pool, num_natural)
    records = [
        {
            "id": f"words-{number:05d}",
            "conversations": [
                {"from": "human", "value": f"{captions[q.image]}\n{q.question}"},
                {"from": "gpt", "value": q.answer},
            ],
        }
        for number, q in enumerate(chosen)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "words.json"
    file.write_text(json.dumps(records, indent=1), encoding="utf-8")
    return file


def draw_plain(pool: list[Question], rng: random.Random) -> list[Question]:
    """Draw yes-or-no questions, each wording as often yes as no, and few wordings with a negation, in random order."""
    groups: dict[str, dict[str, list[Question]]] = defaultdict(lambda: defaultdict(list))
    for question in pool:
        groups[question.question][question.answer].append(question)
    drawn: list[Question] = []
    for wording, by_answer in groups.items():
        num = min(len(by_answer["yes"]), len(by_answer["no"]))
        if any(word in NEGATIONS for word in wording.rstrip("?").split()):
            num = round(num * NEGATED_SHARE)
        for answer in ("yes", "no"):
            drawn += rng.sample(by_answer[answer], num)
    rng.shuffle(drawn)
    return drawn
