"""The quickstart's evaluation, report and next steps."""

import json
import random
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llava_ray.generate.answers import Actors, answer_questions
from llava_ray.generate.questions import ModelQuestion
from llava_ray.invocation import command, recipe_argument
from llava_ray.quickstart import easy_vqa
from llava_ray.report.pieces import AnswerVerdict, Link, Links, Picture, Report
from llava_ray.report.tuning import Accuracy, tuning_report
from llava_ray.train.finished_run import FinishedRun

_NUM_PICTURES = 24
_NEXT_STEPS = """
What next
  curves and artifacts    {bin}mlflow ui --backend-store-uri {tracking_uri}
  what the model saw      {bin}{preview} --model {folder}/model \\
                            --data {data} --image_folder {images}
  your own data           {bin}{finetune} {yours} \\
                            --data.data_path {data} --data.image_folder {images}
                          (with your file and folder in place of these)
  LLaVA-1.5, on 8 GPUs    {bin}{finetune} \\
                            {pretrain} --dry-run
"""


def answer(
    tuned: FinishedRun, conversations: Sequence[Sequence[easy_vqa.ShapeQuestion]], actors: Actors
) -> dict[str, str]:
    """Generate the model's answers by question id, greedily in batches, or load them.

    A later question of a conversation is asked with the model's own answers to the earlier ones before it.
    """
    kept = Path(tuned.folder.path, "answers.json")
    if kept.exists():
        print(f"Reused: {kept}")
        return dict(json.loads(kept.read_text()))
    questions = [
        ModelQuestion(first.id, first.question, str(first.image), follow_ups=[q.question for q in later])
        for first, *later in conversations
    ]
    given = answer_questions(tuned.folder.bundle, questions, max_new_tokens=8, batch_size=50, actors=actors)
    said = {
        question.id: text
        for conversation, answered in zip(conversations, given, strict=True)
        for question, text in zip(conversation, (answered.answer, *answered.later_answers), strict=True)
    }
    kept.write_text(json.dumps(said, indent=0))
    return said


def make_quickstart_report(
    report: Mapping[str, Any],
    runs: Mapping[str, FinishedRun],
    conversations: Sequence[Sequence[easy_vqa.ShapeQuestion]],
    said: Mapping[str, str],
) -> Report:
    """Build the report."""
    total = Accuracy("all", report["held_out_accuracy"], report["blind_accuracy"], report["num_test_questions"])
    kinds, positions = (
        [Accuracy(name, part["model"], part["blind"], part["num_questions"]) for name, part in report[key].items()]
        for key in ("by_kind", "by_position")
    )
    losses = {stage: run.read_losses() for stage, run in runs.items()}
    rng = random.Random(0)
    pictures = [
        _picture(some[: rng.randint(1, len(some))], said) for some in rng.sample(list(conversations), _NUM_PICTURES)
    ]
    links = [Link("report.json", "report.json"), Link("the model, a bundle", "model/llava.json")]
    links += [Link(f"run: {stage}", f"{run.folder.name}/resolved.json") for stage, run in runs.items()]
    return tuning_report(
        "A small LLaVA, trained here", [total, *kinds], positions, losses, pictures, report["seconds"], Links(links)
    )


def _picture(asked: Sequence[easy_vqa.ShapeQuestion], said: Mapping[str, str]) -> Picture:
    """Return a test image with the last question, answer and truth; the turns before it are the caption."""
    *earlier, last = asked
    answer = said.get(last.id, "")
    verdict: AnswerVerdict = "right" if easy_vqa.normalize_answer(answer) == last.answer else "wrong"
    before = " ".join(f"{question.question} {said.get(question.id, '')}" for question in earlier)
    content = last.image.read_bytes()
    return Picture(content, f"test image {last.id}", before, last.question, answer, last.answer, verdict)


def write_examples(folder: Path, asked: Sequence[easy_vqa.ShapeQuestion]) -> None:
    """Write example questions about test images for the service's page."""
    drawn: dict[str, easy_vqa.ShapeQuestion] = {}
    for question in asked:
        drawn.setdefault(question.kind, question)
    (folder / "examples").mkdir(exist_ok=True)
    rows = []
    for question in drawn.values():
        image = shutil.copy(question.image, folder / "examples")
        rows.append({"text": question.question, "image": f"examples/{Path(image).name}"})
    (folder / "examples.json").write_text(json.dumps(rows, indent=1) + "\n")


def print_quickstart(folder: Path, report: Mapping[str, Any], tuned: FinishedRun, data: Path) -> None:
    """Print the results, their paths and next steps."""
    print(f"\nHeld-out accuracy {report['held_out_accuracy']:.1%} on {report['num_test_questions']:,} test questions")
    print(f"Blind baseline    {report['blind_accuracy']:.1%} (most frequent answer, image unseen)")
    for kind, part in report["by_kind"].items():
        print(f"  {kind:<8} {part['model']:.1%}  (blind {part['blind']:.1%}, {part['num_questions']} questions)")
    places = [f"{place} questions {part['model']:.1%}" for place, part in report["by_position"].items()]
    print(f"By place in a conversation about an image: {', '.join(places)}")
    print("Seconds           " + ", ".join(f"{stage} {value:g}" for stage, value in report["seconds"].items()))
    print(f"\nReport   {folder}/report.html\nNumbers  {folder}/report.json\nModel    {folder}/model")
    images = easy_vqa.image_folder("train")
    print(describe_next_steps(tuned.tracking_uri, folder, data, images))


def describe_next_steps(tracking_uri: str, folder: Path, data: Path, images: Path) -> str:
    """Return commands to go on with, as they can be typed where this one was."""
    preview, finetune = command("preview"), command("finetune")
    return _NEXT_STEPS.format(
        bin=".venv/bin/" if preview.startswith("python pipelines/") else "",  # `make` enters no environment
        preview=preview,
        finetune=finetune,
        yours=recipe_argument("quickstart", "yours"),
        pretrain=recipe_argument("pretrain", "llava_v1_5_7b"),
        tracking_uri=tracking_uri,
        folder=folder,
        data=data,
        images=images,
    )
