#!/usr/bin/env python
"""Improve a small model that was stopped early, by preferences of its own answers: two CPU cores, no GPU, no hub.

python pipelines/quickstart_improve.py

The parts and the language model trained on words are those of the quickstart; missing ones are made. The projector's
alignment and the tuning end early.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llava_ray.config.finetune import FinetuneConfig
from llava_ray.config.improve import ImproveConfig
from llava_ray.config.recipes import load_recipe, load_settings
from llava_ray.worker_forks import prepare_forks, start_forks
from pipelines.command import run_command
from pipelines.improve import ImprovedModel, improve_model, print_improvement
from pipelines.quickstart import CACHE, RECIPES, link_stage, train

if TYPE_CHECKING:
    from llava_ray.quickstart.easy_vqa import ShapeQuestion
    from llava_ray.runtime import Resources

RECIPE = str(Path(__file__).parent / "recipes/improve/quickstart.toml")
EARLY_MODEL = "runs/quickstart/early/model"
ALIGN_STEPS = 160
# Of the tuning: the fewest of these with which the model answers seven of ten questions. So early, another processor's
# rounding alone makes ten points: 8 steps have brought 70 % and 83 %.
TUNE_STEPS, ENOUGH, NUM_TRIED = (8, 14, 20), 0.7, 400
_BATCH = 16
NUM_ASKED, NUM_HELD_OUT = 2000, 1600


def main(arguments: Sequence[str]) -> ImprovedModel:
    """Train the model that is stopped early, then improve it."""
    load_settings(ImproveConfig, [RECIPE, *arguments])
    words = load_recipe(FinetuneConfig, [f"{RECIPES}/words.toml"])
    prepare_forks(words)
    from llava_ray.runtime import connected, start_ahead

    start_ahead(words.cluster)
    from llava_ray.report.charts import check_plotting

    check_plotting()
    import pipelines.improve_results  # noqa: F401 - imported before the workers' server is forked
    from llava_ray.quickstart import easy_vqa

    start_forks()
    with connected(words.cluster, storage_path=words.run.storage_path) as resources:
        train_early(resources)
        write_splits(easy_vqa.train_questions(NUM_ASKED, seed=1), easy_vqa.test_questions(NUM_HELD_OUT, seed=1))
        config = load_settings(ImproveConfig, [RECIPE, *arguments])
        return print_improvement(improve_model(config), config)


def train_early(resources: "Resources") -> str:
    """Train the quickstart's model, but end its last two stages early, or reuse it; return its folder."""
    from llava_ray.generate.answers import Actors
    from llava_ray.quickstart import easy_vqa
    from llava_ray.quickstart.easy_vqa_records import write_conversations, write_open_questions, write_words
    from llava_ray.quickstart.registry_weights import make_language_model, make_vision_tower
    from pipelines.quickstart_results import answer

    for weights in (make_vision_tower(CACHE), make_language_model(CACHE)):
        print(f"{'Reused' if weights.reused else 'Converted'}: {weights.path}")
    write_words(CACHE, seed=0)
    write_open_questions(CACHE, seed=0)
    write_conversations(CACHE, seed=0)
    spoken = train(load_recipe(FinetuneConfig, [f"{RECIPES}/words.toml"]), resources)
    common = ["--model.model_name_or_path", spoken.folder.bundle]
    common += ["--data.image_folder", str(easy_vqa.image_folder("train"))]
    aligned = train(
        load_recipe(FinetuneConfig, [f"{RECIPES}/align.toml", *_stop_after(ALIGN_STEPS), *common]), resources
    )
    tried = easy_vqa.test_questions(NUM_TRIED, seed=2)
    actors = Actors(resources.num_workers, resources.cpus_per_worker)
    for steps in TUNE_STEPS:
        few = ["--model.pretrain_mm_mlp_adapter", aligned.folder.bundle, *_stop_after(steps)]
        tuned = train(load_recipe(FinetuneConfig, [f"{RECIPES}/tune.toml", *few, *common]), resources)
        said = answer(tuned, [(question,) for question in tried], actors)
        right = easy_vqa.score_shape_answers(said, tried).total.accuracy
        print(f"After {steps} steps of tuning it answers {right:.1%} of {NUM_TRIED} questions right", flush=True)
        if right >= ENOUGH:
            break
    link_stage(tuned, "early")
    return EARLY_MODEL


def _stop_after(steps: int) -> list[str]:
    """Return the flags of a stage that ends after so many steps, with the data of these alone."""
    return ["--train.max_steps", str(steps), "--data.max_samples", str(steps * _BATCH)]


def write_splits(asked: "Sequence[ShapeQuestion]", held_out: "Sequence[ShapeQuestion]", folder: Path = CACHE) -> None:
    """Write the questions that preferences are made of, and those that are held out, as benchmarks."""
    from llava_ray.quickstart import easy_vqa

    for name, questions in (("asked", asked), ("held_out", held_out)):
        easy_vqa.write_benchmark(folder / name, questions)


if __name__ == "__main__":
    run_command(main)
