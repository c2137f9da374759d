"""GQA: compositional questions about scenes, one gold word or phrase (testdev balanced: 12,578)."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from evals.benchmark import SHORT, UNPARSED, Benchmark, Grade, Judge, Profile, Question, grade_choice
from evals.files import as_json, find, need, read_json_value
from evals.matching.plain_text import to_plain_text, without_lead_in
from evals.matching.yes_no import parse_yes_no


class GQA(Benchmark):
    """Strict equality with one gold word or phrase; no number words, no articles.

    Obtain: https://cs.stanford.edu/people/dorarad/gqa/download.html. The folder holds
    ``testdev_balanced_questions.json`` (or another split's) and ``images/``.

    llava: its converter strips final periods and lowers case, then equality. official: equality as it is (accuracy
    only; consistency, validity and the like need scene graphs). robust: case, outer space and final marks do not
    matter, runs of space are one; yes and no are read as ``evals.matching.yes_no.parse_yes_no`` does.

    Robust, answer | truth | score::

        'Yes.' | yes | 1
        ' yes' | yes | 1
        'Left' | left | 1
        'yes!' | yes | 1
        'dining  table' | dining table | 1
        '"chair"' | chair | 1
        '**no**' | no | 1
        'the left' | left | 0
        'Two' | 2 | 0
        't shirt' | t-shirt | 0
        't-shirt' | tshirt | 0
        '.' | yes | unparsed
        '' | yes | unparsed
    """

    name = "gqa"
    title = "GQA"

    def read(self, folder: Path) -> list[Question]:
        """Read a split's questions."""
        path = find(folder, "testdev_balanced_questions.json", "*_balanced_questions.json", "*questions*.json")
        questions = []
        for name, row in read_json_value(path).items():
            image = need(row, "imageId", path)
            types = row.get("types") or {}
            categories = tuple(str(types[key]) for key in ("structural",) if types.get(key))
            truths = (row["answer"],) if "answer" in row else ()
            file = folder / "images" / f"{image}.jpg"
            questions.append(
                Question(name, need(row, "question", path) + SHORT, (file,), truths, (), categories, str(image))
            )
        return questions

    def grade(self, question: Question, answer: str, profile: Profile, judge: Judge | None = None) -> Grade:
        """Grade by equality."""
        if profile == "llava":
            return grade_choice(answer.rstrip(".").lower(), question.truths)
        if profile == "official":
            return grade_choice(answer, question.truths)
        truths = [plain_words(truth) for truth in question.truths]
        if set(truths) <= {"yes", "no"}:
            return grade_choice(parse_yes_no(answer), truths)
        words = plain_words(answer)
        return grade_choice(words, truths) if words else UNPARSED

    def submit(self, questions: Sequence[Question], answers: Mapping[str, str]) -> dict[str, bytes]:
        """Build the predictions for the official eval.py and the server."""
        rows = [{"questionId": q.id, "prediction": answers.get(q.id, "").rstrip(".").lower()} for q in questions]
        return {"testdev_balanced_predictions.json": as_json(rows)}


def plain_words(text: str) -> str:
    """Normalise a plain text: lower case, single spaces, without surrounding marks or "The answer is"."""
    return " ".join(without_lead_in(to_plain_text(text)).lower().split()).strip(" .,;:!?\"'`*。、…")
