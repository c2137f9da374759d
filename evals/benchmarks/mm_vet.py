"""MM-Vet: 218 questions that need several abilities together; a judge grades in tenths."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from evals.benchmark import FAILED, Benchmark, Grade, Graded, Judge, Profile, Question, Total, by_category, percentage
from evals.files import as_json, find, need, read_json_value
from llava_ray.errors import DataError
from llava_ray.replies import parse_first_word, parse_grade

_INSTRUCTION = (
    "Grade a prediction against the ground truth. <AND> in the ground truth: totally right only if all elements "
    "are in the prediction; <OR>: totally right if any one is. The correctness is 0.0 (totally wrong), 0.1, 0.2, 0.3, "
    "0.4, 0.5, 0.6, 0.7, 0.8, 0.9 or 1.0 (totally right). Reply with the last cell's number only.\n\n"
    "Question | Ground truth | Prediction | Correctness\n--- | --- | --- | ---\n"
)
_EXAMPLES = (
    ("What is x in the equation?", "-1 <AND> -5", "x = 3", "0.0"),
    ("What is x in the equation?", "-1 <AND> -5", "x = -1", "0.5"),
    ("What is x in the equation?", "-1 <AND> -5", "x = -5 or 5", "0.5"),
    ("What is x in the equation?", "-1 <AND> -5", "x = -1 or x = -5", "1.0"),
)


class MMVet(Benchmark):
    r"""100 x the mean of scores from 0 to 1; a question counts in each of its abilities.

    Obtain: https://github.com/yuweihao/MM-Vet/releases (mm-vet.zip). The folder holds ``mm-vet.json`` and ``images/``.
    Reviews are ``{"question_id", "content"}`` lines, the content being the judge's reply. Several runs of the judge are
    several results: compare them for its variance.

    llava and official: the reply's first word is the number. robust: the reply says exactly one grade from 0 to 1,
    alone on its line, before its reasons or after a word such as "Correctness:"; a failure is left out and counted,
    never 0.

    Robust, review | score::

        '1.0' | 1
        '0.5' | .5
        ' 0.5\n' | .5
        '1' | 1
        '0' | 0
        '**0.7**' | .7
        'Correctness: 0.7' | .7
        '0.3 because it names one.' | .3
        '| 0.4 |' | .4
        '<think>0.1</think>0.4' | .4
        '0.5 or 0.6' | failed
        '1/10' | failed
        '1 element is missing' | failed
        '5' | failed
        '10' | failed
        'totally right' | failed
        '' | failed
    """

    name = "mm_vet"
    title = "MM-Vet"
    metric = "judge's score"
    needs_judge = ("llava", "official", "robust")
    max_new_tokens = 1024

    def read(self, folder: Path) -> list[Question]:
        """Read all questions."""
        path = find(folder, "mm-vet.json")
        questions = []
        for name, row in read_json_value(path).items():
            image = need(row, "imagename", path)
            questions.append(
                Question(
                    name,
                    need(row, "question", path),
                    (folder / "images" / image,),
                    (str(need(row, "answer", path)),),
                    categories=tuple(need(row, "capability", path)),
                    cluster=image,
                    aliases=(name.removeprefix("v1_"),),
                )
            )
        return questions

    def grade(self, question: Question, answer: str, profile: Profile, judge: Judge | None = None) -> Grade:
        """Grade the answer by its review. Raises DataError."""
        if judge is None:
            raise DataError(f"{self.title} needs a judge: provide its reviews with --reviews FILE")
        reply = judge(question.id, grading_request(question, answer)) or ""
        score = parse_grade(reply) if profile == "robust" else parse_first_word(reply)
        return FAILED if score is None else Grade(score, f"{score:g}")

    def add_up(self, rows: Sequence[Graded], profile: Profile) -> Total:
        """Compute the mean score without failures."""
        return Total(percentage(rows).value, {}, by_category(rows))

    def submit(self, questions: Sequence[Question], answers: Mapping[str, str]) -> dict[str, bytes]:
        """Build the file for the official grader."""
        return {"mm_vet_upload.json": as_json({q.id: answers.get(q.id, "") for q in questions})}


def grading_request(question: Question, answer: str) -> str:
    """Build the judge's request."""
    rows = [" | ".join(row) for row in _EXAMPLES]
    return _INSTRUCTION + "\n".join([*rows, f"{question.prompt} | {question.truths[0]} | {answer} | "])
