"""SEED-Bench: 19,242 questions with four options in twelve dimensions, on images and video frames."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from evals.benchmark import (
    LETTER,
    Benchmark,
    Grade,
    Graded,
    Judge,
    Profile,
    Question,
    Total,
    by_category,
    grade_choice,
    list_options,
    percentage,
)
from evals.files import as_lines, find, need, read_json_value
from evals.matching.letters import parse_letter

_CHOICES = ("choice_a", "choice_b", "choice_c", "choice_d")


class SEEDBench(Benchmark):
    """One letter; scores of images and of video besides the whole (LLaVA-1.5 reports the whole, 1.6 images only).

    Obtain: https://github.com/AILab-CVC/SEED-Bench/blob/main/DATASET.md. The folder holds ``SEED-Bench.json``,
    ``SEED-Bench-image/`` and, of each video, its middle frame as ``SEED-Bench-video-image/QUESTION_ID.png``.

    llava and official: the answer is exactly the letter (the authors rank likelihoods, see ``evals.ranking``). robust:
    see ``evals.matching.letters.parse_letter``.

    Robust, answer | truth | score (options apple, pear, plum, fig)::

        'A' | A | 1
        'A.' | A | 1
        'a' | A | 1
        '(A)' | A | 1
        'Apple' | A | 1
        'Answer: A' | A | 1
        'A. apple' | A | 1
        'It is an apple.' | A | 1
        'Option C' | C | 1
        'an apple or a pear' | A | unparsed
        'E' | A | unparsed
        '' | A | unparsed
    """

    name = "seed_bench"
    title = "SEED-Bench"

    def read(self, folder: Path) -> list[Question]:
        """Read all questions."""
        path = find(folder, "SEED-Bench.json", "SEED-Bench*.json")
        content = read_json_value(path)
        dimensions = {number: name for name, number in need(content, "question_type", path).items()}
        questions = []
        for row in need(content, "questions", path):
            name, kind = str(need(row, "question_id", path)), need(row, "data_type", path)
            options = tuple(str(row[key]) for key in _CHOICES if row.get(key) is not None)
            image = (
                folder / "SEED-Bench-image" / need(row, "data_id", path)
                if kind == "image"
                else folder / "SEED-Bench-video-image" / f"{name}.png"
            )
            prompt = need(row, "question", path) + list_options(options) + LETTER
            categories = (kind, dimensions.get(kind_id := need(row, "question_type_id", path), str(kind_id)))
            truths = (row["answer"],) if row.get("answer") else ()
            questions.append(
                Question(name, prompt, (image,), truths, options, categories, str(need(row, "data_id", path)))
            )
        return questions

    def grade(self, question: Question, answer: str, profile: Profile, judge: Judge | None = None) -> Grade:
        """Grade the letter."""
        if profile == "robust":
            return grade_choice(parse_letter(answer, question.options), question.truths)
        return grade_choice(answer if answer in tuple("ABCD") else None, question.truths)

    def add_up(self, rows: Sequence[Graded], profile: Profile) -> Total:
        """Compute the accuracies over all questions (micro average)."""
        categories = by_category(rows)
        kinds: dict[str, float | None] = {
            kind: categories[kind].value for kind in ("image", "video") if kind in categories
        }
        return Total(percentage(rows).value, kinds, categories)

    def submit(self, questions: Sequence[Question], answers: Mapping[str, str]) -> dict[str, bytes]:
        """Build the leaderboard's submission file."""
        rows = [{"question_id": q.id, "prediction": answers.get(q.id, "")} for q in questions]
        return {"seed_bench_upload.jsonl": as_lines(rows)}
