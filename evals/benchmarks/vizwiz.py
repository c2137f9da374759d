"""VizWiz: questions of blind people about their own photographs; val is scored here, test by EvalAI's server."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from evals.benchmark import SHORT, Benchmark, Grade, Judge, Profile, Question
from evals.benchmarks.vqav2 import grade_by_humans, humans_question
from evals.files import as_json, find, need, read_json_value, read_lines
from evals.matching.vqa_text import normalise_evalai

_UNANSWERABLE = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."


class VizWiz(Benchmark):
    """VQAv2's rule on ten answers, "unanswerable" among them.

    Obtain: https://vizwiz.org/tasks-and-datasets/vqa/ (Annotations.zip, val.zip, test.zip). The folder holds
    ``val.json`` with ``val/``, or ``test.json`` with ``test/``; a list of ``{"image", "question", "answers"}``. An
    answer's id is its image's name; with LLaVA's ``llava_test.jsonl`` in the folder, its question ids are known too.

    llava: EvalAI's normaliser. official: the VQA script, each human being another one. robust: as in VQAv2.

    Robust, answer | humans | score::

        'unanswerable' | unanswerable*10 | 1
        'Unanswerable.' | unanswerable*10 | 1
        'unsuitable' | unanswerable*10 | 0
        'coke' | coke*3, coca cola*7 | .9
        'Coca-Cola' | coke*3, coca cola*7 | 1
        'the coke' | coke*2, pepsi*8 | .6
        'no' | no*1, yes*9 | .3
        'two' | 2*10 | 1
        'black/white' | black white*10 | 1
        '' | unanswerable*10 | unparsed
    """

    name = "vizwiz"
    title = "VizWiz"
    metric = "VQA accuracy"

    def read(self, folder: Path) -> list[Question]:
        """Read val.json, or test.json, which has no answers."""
        path = find(folder, "val.json", "test.json")
        ids = {
            need(row, "image", file): str(need(row, "question_id", file))
            for file in folder.glob("llava_*.jsonl")
            for row in read_lines(file)
        }
        questions = []
        for row in read_json_value(path):
            name = need(row, "image", path)
            image = folder / path.stem / name
            question = humans_question(name, need(row, "question", path) + _UNANSWERABLE + SHORT, image, row)
            # The file has no ids of its annotators: each is distinct.
            facts = {"answer_ids": list(range(len(question.truths)))}
            aliases = (name.partition(".")[0], *([ids[name]] if name in ids else []))
            questions.append(
                Question(
                    name, question.prompt, (image,), question.truths, (), question.categories, name, "", aliases, facts
                )
            )
        return questions

    def grade(self, question: Question, answer: str, profile: Profile, judge: Judge | None = None) -> Grade:
        """Score 0 to 1 by the number of matching human answers."""
        return grade_by_humans(question, answer, profile)

    def submit(self, questions: Sequence[Question], answers: Mapping[str, str]) -> dict[str, bytes]:
        """Build EvalAI's submission: every image, answers normalised."""
        rows = [{"image": q.id, "answer": normalise_evalai(answers.get(q.id, ""))} for q in questions]
        return {"vizwiz_upload.json": as_json(rows)}
