"""What the quickstart makes of its answers: scores, report.json, the report page, and what to do next."""

import json
import random
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evals import easy_vqa
from llava_ray.generate.answers import Actors, Question, answer_questions
from llava_ray.report.pieces import Link, Links, Picture, Report
from llava_ray.report.tuning import Accuracy, Curve, tuning_report
from llava_ray.runtime import Resources
from llava_ray.train.trainer import FinishedRun

NUM_PICTURES = 24
MAX_NEW_TOKENS = 8
BATCH_SIZE = 50


def answer(tuned: FinishedRun, questions: Sequence[easy_vqa.Question], resources: Resources) -> Mapping[str, str]:
    """Ask the model every question, greedily and in batches, and keep the answers beside it."""
    asked = [Question(q.id, q.question, str(q.image)) for q in questions]
    actors = Actors(num=resources.num_workers, num_cpus=resources.cpus_per_worker)
    given = answer_questions(
        tuned.folder.bundle, asked, max_new_tokens=MAX_NEW_TOKENS, batch_size=BATCH_SIZE, actors=actors
    )
    answers = {a.id: a.answer for a in given}
    answers_path(tuned).write_text(json.dumps(answers, indent=0))
    return answers


def read_answers(tuned: FinishedRun) -> Mapping[str, str] | None:
    """Return the answers of an earlier evaluation of the same run, if there was one."""
    path = answers_path(tuned)
    if not path.exists():
        return None
    print(f"Reused: {path}")
    answers: dict[str, str] = json.loads(path.read_text())
    return answers


def answers_path(tuned: FinishedRun) -> Path:
    """Say where a run's answers are kept."""
    return Path(tuned.folder.path) / "answers.json"


def publish(
    folder: Path,
    tuned: FinishedRun,
    questions: Sequence[easy_vqa.Question],
    answers: Mapping[str, str],
    seconds: Mapping[str, float],
) -> dict[str, Any]:
    """Put the bundle at ``folder/model``, write ``folder/report.json`` and return its contents."""
    shutil.rmtree(folder / "model", ignore_errors=True)
    shutil.copytree(tuned.folder.bundle, folder / "model")
    score = easy_vqa.accuracy(answers, questions)
    blind = easy_vqa.accuracy(blind_guesses(questions), questions)
    report = {
        "held_out_accuracy": score.total.accuracy,
        "blind_accuracy": blind.total.accuracy,
        "num_test_questions": len(questions),
        "by_kind": {
            kind: {"model": part.accuracy, "blind": blind.by_kind[kind].accuracy, "num_questions": part.num_questions}
            for kind, part in score.by_kind.items()
        },
        "missing_answers": len(score.missing),
        "seconds": dict(seconds),
    }
    (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    return report


def blind_guesses(questions: Sequence[easy_vqa.Question]) -> dict[str, str]:
    """Answer without looking: each question text's most frequent answer in training."""
    frequent = easy_vqa.blind_answers()
    return {q.id: frequent.get(q.question, "") for q in questions}


def make_report(
    folder: Path,
    aligned: FinishedRun,
    tuned: FinishedRun,
    questions: Sequence[easy_vqa.Question],
    answers: Mapping[str, str],
    report: Mapping[str, Any],
) -> Report:
    """Lay out the page."""
    total = Accuracy("all", report["held_out_accuracy"], report["blind_accuracy"], report["num_test_questions"])
    kinds = [Accuracy(kind, p["model"], p["blind"], p["num_questions"]) for kind, p in report["by_kind"].items()]
    curves = [Curve(name, losses(run)) for name, run in (("alignment", aligned), ("instruction tuning", tuned))]
    shown = random.Random(0).sample(list(questions), min(NUM_PICTURES, len(questions)))
    pictures = [picture(q, answers.get(q.id, "")) for q in shown]
    places = {"report.json": "report.json", "the model (a bundle)": "model/", "tuning run": f"{tuned.folder.name}/"}
    links = Links([Link(text, target) for text, target in places.items()])
    return tuning_report("A small LLaVA, trained here", [total, *kinds], curves, pictures, report["seconds"], links)


def losses(run: FinishedRun) -> list[float]:
    """Return a run's loss curve."""
    lines = Path(run.folder.path, "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def picture(question: easy_vqa.Question, given: str) -> Picture:
    """Show a test image with what was asked, said and true."""
    right = easy_vqa.normalise(given) == question.answer
    return Picture(
        Path(question.image).read_bytes(),
        f"test image of question {question.id}",
        question=question.question,
        answer=given,
        truth=question.answer,
        verdict="right" if right else "wrong",
    )


def tell(folder: Path, page: Path, report: Mapping[str, Any], tuned: FinishedRun) -> None:
    """Say what came out, where it is, and what to do next."""
    print(f"\nHeld-out accuracy {report['held_out_accuracy']:.1%} on {report['num_test_questions']:,} test questions")
    print(f"Blind baseline    {report['blind_accuracy']:.1%} (most frequent answer, image unseen)")
    for kind, part in report["by_kind"].items():
        print(f"  {kind:<8} {part['model']:.1%}  (blind {part['blind']:.1%}, {part['num_questions']} questions)")
    print(f"Seconds           {report['seconds']}")
    print(f"\nReport   {page}\nNumbers  {folder / 'report.json'}\nModel    {folder / 'model'}")
    print("\nWhat next")
    print(f"  curves and artifacts     .venv/bin/mlflow ui --backend-store-uri {tuned.tracking_uri}")
    print(f"  what the model saw       .venv/bin/python pipelines/preview.py --model {folder / 'model'} \\")
    print("                             --data runs/cache/quickstart/conversations.json --image_folder \\")
    print(f"                             {easy_vqa.image_folder('train')}")
    print("  your own data            copy pipelines/recipes/quickstart/tune.toml and set data_path and image_folder")
    print("  LLaVA-1.5 on a cluster   ray job submit --working-dir . -- python pipelines/finetune.py \\")
    print("                             pipelines/recipes/finetune/llava_v1_5_7b.toml")
