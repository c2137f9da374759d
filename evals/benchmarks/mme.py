"""MME: fourteen abilities, two opposite yes-or-no questions per image."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from evals.benchmark import (
    SHORT,
    Benchmark,
    Grade,
    Graded,
    Judge,
    MetricValue,
    Profile,
    Question,
    Total,
    grade_choice,
    split_by,
    split_by_category,
)
from evals.files import find_all, read_utf8
from evals.matching.yes_no import parse_mme, parse_yes_no
from llava_ray.errors import DataError

_COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
_INSTRUCTION = "Please answer yes or no."
_QUESTIONS_PER_IMAGE = 2
_SUFFIXES = (".jpg", ".png", ".jpeg")


class MME(Benchmark):
    """Per ability: the share of questions right plus the share of images with both right, in per cent (0..200).

    The headline is the sum over the ten abilities of perception (0..2000), as in LLaVA-1.5's tables; cognition (0..800)
    is reported separately.

    Obtain: https://github.com/BradyFU/Awesome-Multimodal-Large-Language-Models/tree/Evaluation. The folder is
    ``MME_Benchmark_release_version`` (or holds it): a folder an ability, with ``images/`` and
    ``questions_answers_YN/``, or images and ``.txt`` files side by side; a text has two lines: question, tab, answer.

    llava and official: after lowering, exactly yes or no, or the first four characters contain one ("yes" first).
    robust: see ``evals.matching.yes_no.parse_yes_no``.

    Robust, answer | truth | score::

        'Yes' | yes | 1
        'no.' | no | 1
        'YES!' | yes | 1
        'The answer is yes' | yes | 1
        'No, it is a cat.' | no | 1
        'Yes, there is no doubt.' | yes | 1
        'I have no idea' | no | unparsed
        'eyes' | yes | unparsed
        'know' | no | unparsed
        'Not really' | no | unparsed
        'Nope' | no | unparsed
        'yes and no' | yes | unparsed
        '' | no | unparsed
    """

    name = "mme"
    title = "MME"
    metric = "perception score"
    maximum = 2000.0
    category_maximum = 200.0
    is_mean = False

    def read(self, folder: Path) -> list[Question]:
        """Read every ability's questions. Raises DataError for an image that has not exactly two."""
        root = next(iter(sorted(folder.glob("**/MME_Benchmark_release_version"))), folder)
        texts = (
            find_all(root, "*/*.txt")
            if not list(root.glob("*/questions_answers_YN"))
            else sorted([*root.glob("*/*.txt"), *root.glob("*/questions_answers_YN/*.txt")])
        )
        return [question for text in texts for question in _read_pair(text, root)]

    def grade(self, question: Question, answer: str, profile: Profile, judge: Judge | None = None) -> Grade:
        """Grade yes or no."""
        parsed = parse_yes_no(answer) if profile == "robust" else parse_mme(answer)
        return grade_choice(parsed, question.truths)

    def add_up(self, rows: Sequence[Graded], profile: Profile) -> Total:
        """Compute the scores of perception, cognition and each ability."""
        abilities = split_by_category(rows)
        scores = {name: MetricValue(_ability_score(some), len(some)) for name, some in abilities.items()}
        cognition = sum(figure.value or 0.0 for name, figure in scores.items() if name in _COGNITION)
        perception = sum(figure.value or 0.0 for name, figure in scores.items() if name not in _COGNITION)
        return Total(perception, {"perception": perception, "cognition": cognition}, scores)

    def submit(self, questions: Sequence[Question], answers: Mapping[str, str]) -> dict[str, bytes]:
        """Build the tables for the official calculation.py, one per ability."""
        lines: dict[str, str] = defaultdict(str)
        for question in questions:
            answer = " ".join(answers.get(question.id, "").split())
            text, truth = question.facts["text"], question.truths[0].capitalize()
            lines[question.categories[0]] += f"{question.facts['image']}\t{text}\t{truth}\t{answer}\n"
        return {f"mme/{ability}.txt": text.encode(errors="replace") for ability, text in lines.items()}


def _ability_score(rows: Sequence[Graded]) -> float:
    """Compute the share of correct questions plus that of images with all questions correct, in per cent."""
    images = split_by(rows, lambda row: row.group).values()
    questions = sum(row.score for row in rows) / len(rows)
    return 100 * (questions + sum(min(row.score for row in pair) for pair in images) / len(images))


def _read_pair(text: Path, root: Path) -> list[Question]:
    ability = text.relative_to(root).parts[0]
    folder = text.parent.parent / "images" if text.parent.name == "questions_answers_YN" else text.parent
    image = next(
        (folder / f"{text.stem}{s}" for s in _SUFFIXES if (folder / f"{text.stem}{s}").exists()),
        folder / f"{text.stem}.jpg",
    )
    rows = [line.split("\t") for line in map(str.strip, read_utf8(text).split("\n")) if line]
    if len(rows) != _QUESTIONS_PER_IMAGE or any(len(row) != 2 for row in rows):
        raise DataError(f"{text} has {len(rows)} lines; expected two, each a question, a tab and Yes or No.")
    group = f"{ability}/{text.stem}"
    questions = []
    for number, (asked, truth) in enumerate(rows):
        bare = asked.replace(_INSTRUCTION, "").strip()
        # LLaVA's files identify an image by its name, with any ending, and its two questions by their text.
        known = [
            f"{ability}/{name}\n{words.lower()}"
            for name in (image.name, text.stem + ".jpg", text.stem + ".png")
            for words in (bare, asked.strip())
        ]
        facts = {"text": asked, "image": image.name}
        questions.append(
            Question(
                f"{group}/{number}",
                bare + SHORT,
                (image,),
                (truth.strip().lower(),),
                (),
                (ability,),
                group,
                group,
                tuple(dict.fromkeys(known)),
                facts,
            )
        )
    return questions
