#!/usr/bin/env python
"""Train a small real LLaVA on this machine and show what it learnt: no GPU, no hub account.

python pipelines/quickstart.py

DINOv2-small and SmolLM2-135M come from registry packages, images and questions from easy-vqa. A projector is aligned
on captions, the model is tuned on questions, both with DeepSpeed under Ray Train, and the test split is asked.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from evals import easy_vqa
from llava_ray.config.recipes import load_recipe
from llava_ray.config.sections import FinetuneConfig
from llava_ray.data.preparation import prepare_data
from llava_ray.model.registry_weights import make_language_model, make_vision_tower
from llava_ray.report.rendering import write_report
from llava_ray.runtime import Resources, connected
from llava_ray.train.trainer import FinishedRun, finetune
from pipelines.command import run_command
from pipelines.quickstart_results import answer, make_report, publish, read_answers, tell

CACHE = Path("runs/cache/quickstart")
FOLDER = Path("runs/quickstart")
RECIPES = Path("pipelines/recipes/quickstart")
NUM_TRAIN_QUESTIONS = 12_000
NUM_TEST_QUESTIONS = 1_000


def main(arguments: Sequence[str]) -> float:
    """Do every stage that is not done yet, write the report, return the held-out accuracy."""
    seconds: dict[str, float] = {}
    with timed("weights", seconds):
        for weights in (make_vision_tower(CACHE), make_language_model(CACHE)):
            print(f"{'Reused' if weights.reused else 'Converted'}: {weights.path}")
    with timed("data", seconds):
        easy_vqa.write_captions(CACHE)
        easy_vqa.write_conversations(CACHE, num_questions=NUM_TRAIN_QUESTIONS, seed=0)
    align = load_recipe(FinetuneConfig, [str(RECIPES / "align.toml"), *images("train"), *arguments])
    with connected(align.cluster) as resources:
        with timed("align", seconds):
            aligned = train(align, resources)
        adapter = ("--model.pretrain_mm_mlp_adapter", aligned.folder.bundle)
        tune = load_recipe(FinetuneConfig, [str(RECIPES / "tune.toml"), *adapter, *images("train"), *arguments])
        with timed("tune", seconds):
            tuned = train(tune, resources)
        with timed("evaluate", seconds):
            questions = easy_vqa.test_questions(NUM_TEST_QUESTIONS, seed=0)
            answers = read_answers(tuned) or answer(tuned, questions, resources)
    report = publish(FOLDER, tuned, questions, answers, seconds)
    page = write_report(FOLDER / "report.html", make_report(FOLDER, aligned, tuned, questions, answers, report))
    tell(FOLDER, page, report, tuned)
    return report["held_out_accuracy"]


def train(config: FinetuneConfig, resources: Resources) -> FinishedRun:
    """Prepare and tune one stage, or find it done."""
    finished = finetune(config, prepare_data(config.data), resources)
    print(f"{'Reused' if finished.reused else 'Trained'}: {finished.folder.bundle}")
    return finished


def images(split: str) -> tuple[str, str]:
    """Return the flag that says where the split's images are."""
    return "--data.image_folder", str(easy_vqa.image_folder(split))


@contextmanager
def timed(stage: str, seconds: dict[str, float]) -> Iterator[None]:
    """Say that a stage begins, and note how long it took."""
    print(f"\n== {stage}", flush=True)
    start = time.perf_counter()
    yield
    seconds[stage] = round(time.perf_counter() - start, 1)


if __name__ == "__main__":
    run_command(main)
