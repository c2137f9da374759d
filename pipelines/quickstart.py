#!/usr/bin/env python
"""Train and evaluate a small real LLaVA on this machine, without a GPU or hub account.

python pipelines/quickstart.py

DINOv2-small and SmolLM2-135M, cut to a few layers, come from registry packages, images and questions from easy-vqa.
The language model learns to answer about scenes in words, a projector is aligned, the whole is tuned on images, each
with DeepSpeed under Ray Train, and the test split is asked, in conversations of three questions about an image.
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llava_ray.config.finetune import FinetuneConfig
from llava_ray.config.recipes import load_recipe
from llava_ray.worker_forks import prepare_forks, start_forks
from pipelines.command import run_command, timed

if TYPE_CHECKING:
    from llava_ray.runtime import Resources
    from llava_ray.train.finished_run import FinishedRun

CACHE, _FOLDER = Path("runs/cache/quickstart"), Path("runs/quickstart")
RECIPES = Path(__file__).parent / "recipes/quickstart"
_NUM_TEST_CONVERSATIONS = 400  # of three questions each


def main(arguments: Sequence[str]) -> float:
    """Run all unfinished stages, write the report, and return the held-out accuracy."""
    words = load_recipe(FinetuneConfig, [f"{RECIPES}/words.toml", *arguments])
    prepare_forks(words)
    from llava_ray.runtime import connected, start_ahead

    start_ahead(words.cluster)
    from llava_ray.report.charts import check_plotting

    check_plotting()
    from llava_ray.generate.answers import Actors
    from llava_ray.model.formats.manifest import read_manifest, write_manifest
    from llava_ray.quickstart import easy_vqa
    from llava_ray.quickstart.easy_vqa_records import write_conversations, write_open_questions, write_words
    from llava_ray.quickstart.registry_weights import make_language_model, make_vision_tower
    from llava_ray.report.rendering import write_report
    from pipelines.quickstart_results import answer, make_quickstart_report, print_quickstart, write_examples

    start_forks()
    seconds: dict[str, float] = {}
    with timed("weights", seconds):
        for weights in (make_vision_tower(CACHE), make_language_model(CACHE)):
            print(f"{'Reused' if weights.reused else 'Converted'}: {weights.path}")
    with timed("data", seconds):
        write_words(CACHE, seed=0)
        write_open_questions(CACHE, seed=0)
        data = write_conversations(CACHE, seed=0)
    with connected(words.cluster, storage_path=words.run.storage_path) as resources:
        with timed("words", seconds):
            spoken = train(words, resources)
        common = ["--model.model_name_or_path", spoken.folder.bundle]
        common += ["--data.image_folder", str(easy_vqa.image_folder("train")), *arguments]
        with timed("align", seconds):
            aligned = train(load_recipe(FinetuneConfig, [f"{RECIPES}/align.toml", *common]), resources)
        with timed("tune", seconds):
            adapter = ["--model.pretrain_mm_mlp_adapter", aligned.folder.bundle]
            tuned = train(load_recipe(FinetuneConfig, [f"{RECIPES}/tune.toml", *adapter, *common]), resources)
        with timed("evaluate", seconds):
            asked = easy_vqa.test_conversations(_NUM_TEST_CONVERSATIONS, seed=0)
            said = answer(tuned, asked, Actors(resources.num_workers, resources.cpus_per_worker))
    shutil.copytree(tuned.folder.bundle, _FOLDER / "model", dirs_exist_ok=True)
    write_manifest(_FOLDER / "model", read_manifest(Path(tuned.folder.bundle)), _FOLDER / "model")
    link_stage(spoken, "words")
    if tuned.reused and (_FOLDER / "report.json").exists():  # the times of the run that did the work
        seconds = json.loads((_FOLDER / "report.json").read_text())["seconds"]
    report = easy_vqa.compute_accuracies(asked, said) | {"seconds": seconds}
    (_FOLDER / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    runs = {"words": spoken, "alignment": aligned, "instruction tuning": tuned}
    write_report(_FOLDER / "report.html", make_quickstart_report(report, runs, asked, said))
    write_examples(_FOLDER, [question for conversation in asked for question in conversation])
    print_quickstart(_FOLDER, report, tuned, data)
    return float(report["held_out_accuracy"])


def link_stage(finished: "FinishedRun", name: str) -> None:
    """Link a stage's run under the name that recipes use, without the hash."""
    link = _FOLDER / name
    if link.is_symlink():
        link.unlink()
    if not link.exists():
        link.symlink_to(finished.folder.name)


def train(config: FinetuneConfig, resources: "Resources") -> "FinishedRun":
    """Prepare and fine-tune one stage, or reuse it."""
    from llava_ray.data.preparation import prepare_data
    from llava_ray.train.trainer import finetune

    finished = finetune(config, prepare_data(config.data), resources)
    print(f"{'Reused' if finished.reused else 'Trained'}: {finished.folder.bundle}")
    return finished


if __name__ == "__main__":
    run_command(main)
