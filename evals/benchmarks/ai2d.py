"""AI2D: school diagrams with four options (test: 3,088)."""

import re
import zlib
from collections.abc import Iterator
from pathlib import Path

from evals.benchmark import LETTER, LETTERS, Benchmark, Grade, Judge, Profile, Question, grade_choice, list_options
from evals.files import find, find_all, need, picture, read_json_value, read_parquet_rows
from evals.matching.letters import parse_letter
from llava_ray.errors import DataError

_LABELLED = re.compile(r"\s*([A-Z])\.")


class AI2D(Benchmark):
    """One letter. Scores with masked and with plain diagrams differ by many points: report which you use.

    Obtain: https://prior.allenai.org/projects/diagrams (ai2d-all.zip: ``questions/*.json``, ``images/``; its
    ``ai2d_test_ids.csv`` names the test images), or the Parquet files of https://huggingface.co/datasets/lmms-lab/ai2d
    (``test-*.parquet``, also in ``data/``).

    llava and official: "X." in front, else the whole reply, compared without case and punctuation. robust: see
    ``evals.matching.letters.parse_letter``.

    Robust, answer | truth | score (options leaf, root, stem, flower)::

        'A' | A | 1
        'a' | A | 1
        ' A' | A | 1
        '(A)' | A | 1
        'A. leaf' | A | 1
        'A) leaf' | A | 1
        'The answer is A' | A | 1
        'leaf' | A | 1
        'It is the root.' | B | 1
        'leaf and root' | A | unparsed
        '' | A | unparsed
    """

    name = "ai2d"
    title = "AI2D"

    def read(self, folder: Path) -> list[Question]:
        """Read the authors' folder, or the hub's Parquet files."""
        found = list(_from_json(folder) if (folder / "questions").is_dir() else _from_parquet(folder))
        if not found:
            raise DataError(f"{folder} has no question of the test images; see evals/README.md")
        return found

    def grade(self, question: Question, answer: str, profile: Profile, judge: Judge | None = None) -> Grade:
        """Grade the letter."""
        if profile == "robust":
            return grade_choice(parse_letter(answer, question.options), question.truths)
        label = _LABELLED.match(answer)
        letter = label[1] if label else re.sub(r"[^\w\s]", "", answer).upper()
        return grade_choice(letter if len(letter) == 1 else None, question.truths)


def _from_json(folder: Path) -> Iterator[Question]:
    listed = next(iter(sorted(folder.glob("ai2d_test_ids.csv"))), None)
    wanted = set(listed.read_text().split()) if listed else None
    for path in find_all(folder, "questions/*.json"):
        content = read_json_value(path)
        image = content.get("imageName", path.name.removesuffix(".json"))
        if wanted is not None and Path(image).stem not in wanted:
            continue
        for text, row in need(content, "questions", path).items():
            options = tuple(map(str, need(row, "answerTexts", path)))
            yield _question(
                row["questionId"], text, folder / "images" / image, options, int(row["correctAnswer"]), image
            )


def _from_parquet(folder: Path) -> Iterator[Question]:
    find(folder, "test-*.parquet", "data/test-*.parquet", "*.parquet")
    number = 0
    for path in find_all(folder, "test-*.parquet", "data/test-*.parquet", "*.parquet"):
        for row in read_parquet_rows(path):
            options = tuple(map(str, need(row, "options", path)))
            image = picture(row["image"], path)
            yield _question(
                str(number), row["question"], image, options, int(row["answer"]), f"{zlib.crc32(image):08x}"
            )
            number += 1


def _question(
    name: str, text: str, image: Path | bytes, options: tuple[str, ...], right: int, cluster: str
) -> Question:
    return Question(name, text + list_options(options) + LETTER, (image,), (LETTERS[right],), options, cluster=cluster)
