"""VQAv2: 214,354 questions of val2014 to score here; test2015 is scored by EvalAI's server."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from evals.benchmark import SHORT, UNPARSED, Benchmark, Grade, Judge, Profile, Question
from evals.files import as_json, find, need, read_json_value
from evals.matching.vqa_text import (
    llava_accuracy,
    normalise_evalai,
    normalise_robust,
    official_accuracy,
    robust_accuracy,
)
from llava_ray.errors import DataError

_NUM_HUMANS = 10


class VQAv2(Benchmark):
    """Short answers compared with ten human ones.

    Obtain: https://visualqa.org/download.html. The folder holds ``v2_OpenEnded_mscoco_val2014_questions.json`` with
    ``v2_mscoco_val2014_annotations.json`` and the images in ``val2014/``; or, to write a submission,
    ``v2_OpenEnded_mscoco_test-dev2015_questions.json`` (or test2015) with ``test2015/``. The server wants an answer to
    every id of test2015: those of test-dev alone are filled up with '' if the test2015 file is in the folder.

    llava: EvalAI's normaliser on all texts; ten humans, no fewer. official: the authors' script, which normalises only
    where the humans disagree. robust: the script's normaliser always, an empty answer is unparsed, one human is enough.

    Robust, answer | humans | score::

        'cat' | cat*10 | 1
        'cat' | cat*3, dog*7 | .9
        'cat' | cat*2, dog*8 | .6
        'cat' | cat*1, dog*9 | .3
        '2' | two*10 | 1
        'The cat' | cat*10 | 1
        'Yes.' | yes*10 | 1
        'red,white' | red white*9, x*1 | 1
        '1,000' | 1000*10 | 1
        'a' | a*10 | 1
        '0.5' | .5*9, x*1 | 0
        'cat' | cat*2, dog*1 | .4444
        'cat' | cat*1 | 1
        '' | a*10 | unparsed
        ' . ' | a*10 | unparsed
    """

    name = "vqav2"
    title = "VQAv2"
    metric = "VQA accuracy"

    def read(self, folder: Path) -> list[Question]:
        """Read questions, and annotations if available."""
        path = find(
            folder,
            "v2_OpenEnded_mscoco_*val*questions.json",
            "v2_OpenEnded_mscoco_test-dev*questions.json",
            "v2_OpenEnded_mscoco_*questions.json",
        )
        content = read_json_value(path)
        split = "val2014" if "val" in path.name else "test2015"
        known = {}
        for file in sorted(folder.glob(f"v2_mscoco_{split}*annotations.json")):
            known = {need(row, "question_id", file): row for row in need(read_json_value(file), "annotations", file)}
        self._all_ids = self._ids_of_server(folder)
        questions = []
        for row in need(content, "questions", path):
            number, image = need(row, "question_id", path), int(need(row, "image_id", path))
            file = folder / split / f"COCO_{split}_{image:012d}.jpg"
            questions.append(
                humans_question(str(number), need(row, "question", path) + SHORT, file, known.get(number, {}))
            )
        return questions

    def grade(self, question: Question, answer: str, profile: Profile, judge: Judge | None = None) -> Grade:
        """Score 0 to 1 by the number of matching human answers."""
        return grade_by_humans(question, answer, profile)

    def submit(self, questions: Sequence[Question], answers: Mapping[str, str]) -> dict[str, bytes]:
        """Build EvalAI's submission, with answers normalised as LLaVA does."""
        ids = self._all_ids or [question.id for question in questions]
        rows = [{"question_id": int(name), "answer": normalise_evalai(answers.get(name, ""))} for name in ids]
        return {"vqav2_upload.json": as_json(rows)}

    _all_ids: Sequence[str] = ()

    @staticmethod
    def _ids_of_server(folder: Path) -> list[str]:
        whole = folder / "v2_OpenEnded_mscoco_test2015_questions.json"
        return [str(row["question_id"]) for row in read_json_value(whole)["questions"]] if whole.exists() else []


def humans_question(name: str, prompt: str, image: Path, annotation: Mapping[str, object]) -> Question:
    """Build a question with its human answers, if they are known."""
    humans = annotation.get("answers")
    rows = (
        [human if isinstance(human, dict) else {"answer": human} for human in humans]
        if isinstance(humans, list)
        else []
    )
    categories = tuple(str(annotation[key]) for key in ("answer_type",) if key in annotation)
    return Question(
        name,
        prompt,
        (image,),
        tuple(str(row["answer"]) for row in rows),
        categories=categories,
        cluster=image.name,
        facts={"answer_ids": [row.get("answer_id") for row in rows]},
    )


def grade_by_humans(question: Question, answer: str, profile: Profile) -> Grade:
    """Score by human answers under a profile. Raises DataError for LLaVA's rule without ten of them."""
    humans = question.truths
    if profile == "llava":
        if len(humans) != _NUM_HUMANS:
            raise DataError(
                f"question {question.id!r} has {len(humans)} human answers, LLaVA's rule takes {_NUM_HUMANS}; "
                "score with --profile official or robust"
            )
        return Grade(llava_accuracy(answer, humans), normalise_evalai(answer))
    if profile == "official":
        return Grade(official_accuracy(answer, humans, question.facts["answer_ids"]), answer.strip())
    normalised = normalise_robust(answer)
    return Grade(robust_accuracy(answer, humans), normalised) if normalised else UNPARSED
