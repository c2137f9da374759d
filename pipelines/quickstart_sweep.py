#!/usr/bin/env python
"""Sweep the quickstart's alignment, projector type by learning rate: two CPU cores, no GPU, no hub account.

python pipelines/quickstart_sweep.py

The parts and the language model that has learnt the words are those of quickstart.py; what of them is missing is made.
"""

from collections.abc import Sequence

from evals import easy_vqa
from evals.easy_vqa_records import write_open_split, write_words
from llava_ray.config.recipes import load_recipe
from llava_ray.config.sections import FinetuneConfig
from llava_ray.model.registry_weights import make_language_model, make_vision_tower
from llava_ray.runtime import connected
from pipelines.command import run_command
from pipelines.quickstart import CACHE, RECIPES, train
from pipelines.sweep import main as sweep
from pipelines.sweep_results import Sweep

RECIPE = "pipelines/recipes/sweep/quickstart.toml"


def main(arguments: Sequence[str]) -> Sweep:
    """Make what the sweep starts from, then sweep."""
    for weights in (make_vision_tower(CACHE), make_language_model(CACHE)):
        print(f"{'Reused' if weights.reused else 'Converted'}: {weights.path}")
    write_words(CACHE, num_first=3_200, num_natural=5_760, seed=0)
    write_open_split(CACHE, num_held_out_images=500, seed=0)
    words = load_recipe(FinetuneConfig, [f"{RECIPES}/words.toml"])
    with connected(words.cluster) as resources:
        spoken = train(words, resources)
    given = ["--model.model_name_or_path", spoken.folder.bundle]
    given += ["--data.image_folder", str(easy_vqa.image_folder("train"))]
    return sweep([RECIPE, *given, *arguments])


if __name__ == "__main__":
    run_command(main)
