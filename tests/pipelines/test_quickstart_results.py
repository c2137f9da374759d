"""The quickstart asks conversations, and reports accuracy by kind and by place in the conversation."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from llava_ray.generate.answers import Actors, GeneratedAnswer
from llava_ray.generate.questions import ModelQuestion
from llava_ray.quickstart import easy_vqa
from llava_ray.report.rendering import render_report
from llava_ray.train.runs import RunFolder
from llava_ray.train.trainer import FinishedRun
from pipelines import quickstart_results

CONVERSATIONS = easy_vqa.test_conversations(30, seed=0)


@pytest.fixture
def tuned(tmp_path: Path) -> FinishedRun:
    """A finished run of two steps."""
    folder = RunFolder(str(tmp_path), "tune")
    Path(folder.path).mkdir()
    Path(folder.path, "metrics.jsonl").write_text('{"loss": 2.0}\n{"loss": 1.0}\n')
    return FinishedRun(folder, 2, {}, "sqlite:///x", "run", "hash")


@pytest.fixture
def answered(monkeypatch: pytest.MonkeyPatch) -> list[ModelQuestion]:
    """A model that errs in every third question of a conversation; returns what it was asked."""
    asked: list[ModelQuestion] = []
    truth = {(some[0].id, q.question): q.answer for some in CONVERSATIONS for q in some}

    def answer_questions(model: str, questions: Sequence[ModelQuestion], **_: Any) -> list[GeneratedAnswer]:
        asked.extend(questions)
        return [
            GeneratedAnswer(q.id, truth[q.id, q.question], later_answers=(truth[q.id, q.follow_ups[0]], "maybe"))
            for q in questions
        ]

    monkeypatch.setattr(quickstart_results, "answer_questions", answer_questions)
    return asked


def test_each_question_gets_the_answer_at_its_place(tuned: FinishedRun, answered: list[ModelQuestion]) -> None:
    said = quickstart_results.answer(tuned, CONVERSATIONS, Actors())
    assert [(q.question, *q.follow_ups) for q in answered] == [tuple(q.question for q in c) for c in CONVERSATIONS]
    assert [q.image for q in answered] == [str(conversation[0].image) for conversation in CONVERSATIONS]
    assert said == {
        question.id: "maybe" if place == 2 else question.answer
        for conversation in CONVERSATIONS
        for place, question in enumerate(conversation)
    }
    answered.clear()
    assert quickstart_results.answer(tuned, CONVERSATIONS, Actors()) == said
    assert not answered  # kept beside the run


def test_report_and_summary_show_each_place(
    tuned: FinishedRun, answered: list[ModelQuestion], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = quickstart_results.answer(tuned, CONVERSATIONS, Actors())
    report = easy_vqa.compute_accuracies(CONVERSATIONS, said) | {"seconds": {"tune": 1.0}}
    assert json.loads(json.dumps(report)) == report
    made = quickstart_results.make_quickstart_report(report, {"instruction tuning": tuned}, CONVERSATIONS, said)
    page = render_report(made)
    for name in ("first (30)", "second (30)", "third (30)", "yes/no ("):
        assert name in page
    pictures = made.sections[2].pieces[0].pictures  # type: ignore[union-attr]
    wrong = [picture for picture in pictures if picture.verdict == "wrong"]
    assert 0 < len(wrong) < len(pictures)
    for picture in wrong:  # a third question, under the two before it with what was answered
        assert (picture.answer, picture.caption.count("?")) == ("maybe", 2)

    quickstart_results.print_quickstart(tmp_path, report, tuned, tmp_path / "data.json")
    printed = capsys.readouterr().out
    assert "Held-out accuracy 66.7% on 90 test questions" in printed
    assert "first questions 100.0%, second questions 100.0%, third questions 0.0%" in printed
