"""DocVQA: questions about scanned documents, scored by edit distance; test is scored by RRC's server."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from evals.benchmark import SHORT, UNPARSED, Benchmark, Grade, Judge, Profile, Question
from evals.files import as_json, find, need, read_json_value
from evals.matching.numbers import anls, anls_robust, anls_st_vqa
from evals.matching.plain_text import to_plain_text


class DocVQA(Benchmark):
    """ANLS: the best over the golds of 1 - edit distance / length, 0 below 0.5; the mean x 100.

    Obtain: https://rrc.cvc.uab.es/?ch=17 (registration). The folder holds ``val_v1.0_withQT.json`` or ``val_v1.0.json``
    (or ``test_v1.0.json``, for a submission) and ``documents/``.

    llava: its ST-VQA rule, where inner spaces count. official: single spaces in the distance, raw lengths. robust:
    single spaces in both, over plain texts.

    Robust, answer | truth | score::

        'helo' | hello | .8
        'HELLO' | hello | 1
        'abxx' | abcd | .5
        'axxx' | abcd | 0
        'the answer is 42' | 42 | 0
        '  hello   world ' | hello world | 1
        'hello   world' | hello world | 1
        '$ 1,234' | $1,234 | .8571
        'ITC Limited' | itc limited | 1
        '0.28' | 0.28 | 1
        '' | x | unparsed
    """

    name = "docvqa"
    title = "DocVQA"
    metric = "ANLS"

    def read(self, folder: Path) -> list[Question]:
        """Read validation questions, or test questions, which have no answers."""
        path = find(folder, "val_v1.0*.json", "test_v1.0*.json", "spdocvqa_qas/val_v1.0*.json")
        questions = []
        for row in need(read_json_value(path), "data", path):
            name, image = str(need(row, "questionId", path)), need(row, "image", path)
            prompt, truths = need(row, "question", path) + SHORT, tuple(map(str, row.get("answers") or ()))
            kinds = tuple(row.get("question_types") or ())
            questions.append(Question(name, prompt, (folder / image,), truths, (), kinds, image))
        return questions

    def grade(self, question: Question, answer: str, profile: Profile, judge: Judge | None = None) -> Grade:
        """Score 0, or 0.5 to 1."""
        if profile == "robust" and not to_plain_text(answer):
            return UNPARSED
        rule = {"llava": anls_st_vqa, "official": anls, "robust": anls_robust}[profile]
        return Grade(rule(answer, question.truths), answer.strip())

    def submit(self, questions: Sequence[Question], answers: Mapping[str, str]) -> dict[str, bytes]:
        """Build the server's submission file."""
        rows = [{"questionId": int(q.id), "answer": answers.get(q.id, "")} for q in questions]
        return {"docvqa_upload.json": as_json(rows)}
