"""ScienceQA: school science with two to five options (test: 4,241 questions, 2,017 with an image)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evals.benchmark import (
    LETTER,
    LETTERS,
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
from evals.files import as_json, check_complete, find, need, read_json_value
from evals.matching.letters import parse_letter, parse_science_qa, parse_the_answer_is

_IMAGE = "IMG"


class ScienceQA(Benchmark):
    """One letter; the headline is the accuracy of questions with an image, as in LLaVA's tables.

    Obtain: https://github.com/lupantech/ScienceQA (tools/download.sh). The folder holds ``problems.json``,
    ``pid_splits.json`` and ``images/test/ID/image.png`` (or ``test/ID/image.png``). With LLaVA's
    ``llava_test_CQM-A.json`` in the folder, questions are asked in its words.

    llava: the bare letter, "X. " in front, or exactly one "The answer is X" with a character after it; all else is
    unparsed and wrong. official: the latter only, and no random letter where it fails. robust: see
    ``evals.matching.letters.parse_letter``. A missing answer to a question with an image stays in the denominator.

    Robust, answer | truth | score (options teddy bear, rabbit, cat)::

        'B' | B | 1
        'b' | B | 1
        'B.' | B | 1
        'B. cat' | B | 1
        'B.cat' | B | 1
        'The answer is B' | B | 1
        'The answer is B.' | B | 1
        '(B)' | B | 1
        'Answer: B' | B | 1
        'a rabbit' | B | 1
        'D' | B | unparsed
        'B or C' | B | unparsed
        '' | B | unparsed
    """

    name = "science_qa"
    title = "ScienceQA"
    metric = "IMG accuracy"
    is_mean = False
    max_new_tokens = 1024

    def read(self, folder: Path) -> list[Question]:
        """Read the test split, prompted with context, question and options (CQM-A)."""
        path = find(folder, "problems.json")
        problems, splits = read_json_value(path), read_json_value(find(folder, "pid_splits.json"))
        base = folder / "images" if (folder / "images").exists() else folder
        worded = {
            str(row["id"]): row["conversations"][0]["value"].replace("<image>", "").strip() + LETTER
            for file in folder.glob("llava_test_CQM-A.json")
            for row in read_json_value(file)
        }
        names = need(splits, "test", path)
        unworded = [name for name in names if name not in worded] if worded else []
        check_complete(unworded, len(names), f"{folder}/llava_test_CQM-A.json has no wording", "the file")
        return [_question(name, need(problems, name, path), base, worded.get(name)) for name in names]

    def grade(self, question: Question, answer: str, profile: Profile, judge: Judge | None = None) -> Grade:
        """Grade the letter."""
        if profile == "robust":
            return grade_choice(parse_letter(answer, question.options), question.truths)
        letter = parse_science_qa(answer) if profile == "llava" else parse_the_answer_is(answer)
        known = letter if letter and letter in LETTERS[: len(question.options)] else None
        return grade_choice(known, question.truths)

    def add_up(self, rows: Sequence[Graded], profile: Profile) -> Total:
        """Compute the accuracies; without any image, the headline is that of all."""
        categories = by_category(rows)
        total = percentage(rows)
        return Total(
            categories.get(_IMAGE, total).value,
            {"all": total.value},
            categories | {"all": total},
        )

    def averaged(self, rows: Sequence[Graded], category: str | None = None) -> Sequence[Graded]:
        """Return the rows with an image for the headline, or all if none has one."""
        return rows if category else [row for row in rows if _IMAGE in row.categories] or rows

    def submit(self, questions: Sequence[Question], answers: Mapping[str, str]) -> dict[str, bytes]:
        """Build results in the form of the authors' script: indices of options, -1 without an answer."""
        letters = {q.id: parse_letter(answers.get(q.id, ""), q.options) for q in questions}
        found = {name: LETTERS.index(letter) if letter else -1 for name, letter in letters.items()}
        return {"scienceqa_results.json": as_json({"results": found, "outputs": dict(answers)})}


def _question(name: str, row: Mapping[str, Any], base: Path, prompt: str | None) -> Question:
    options, hint, image = tuple(map(str, row["choices"])), str(row.get("hint") or "").strip(), row.get("image")
    context = f"Context: {hint}\n" if hint else ""
    full_prompt = prompt or context + row["question"] + list_options(options) + LETTER
    files = (base / "test" / name / str(image),) if image else ()
    subjects = (str(row["subject"]),) if row.get("subject") else ()
    categories = (_IMAGE if image else "text", *subjects)
    return Question(name, full_prompt, files, (LETTERS[int(row["answer"])],), options, categories, name)
