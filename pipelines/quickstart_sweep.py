#!/usr/bin/env python
"""Sweep the quickstart's alignment, projector type by learning rate: two CPU cores, no GPU, no hub account.

python pipelines/quickstart_sweep.py

The parts and the language model trained on words are those of the quickstart; missing ones are made.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llava_ray.config.finetune import FinetuneConfig
from llava_ray.config.recipes import load_recipe
from llava_ray.config.sweep_recipes import load_sweep
from llava_ray.worker_forks import prepare_forks, start_forks
from pipelines.command import run_command
from pipelines.quickstart import CACHE, RECIPES, train
from pipelines.sweep import main as sweep

if TYPE_CHECKING:
    from pipelines.sweep_results import Sweep

_RECIPE = str(Path(__file__).parent / "recipes/sweep/quickstart.toml")


def main(arguments: Sequence[str]) -> "Sweep | None":
    """Prepare the sweep's inputs, then run it."""
    load_sweep([_RECIPE, *arguments])
    words = load_recipe(FinetuneConfig, [f"{RECIPES}/words.toml"])
    prepare_forks(words)
    from llava_ray.runtime import connected, start_ahead

    start_ahead(words.cluster)
    from llava_ray.quickstart import easy_vqa
    from llava_ray.quickstart.easy_vqa_records import write_open_split, write_words
    from llava_ray.quickstart.registry_weights import make_language_model, make_vision_tower

    start_forks()
    for weights in (make_vision_tower(CACHE), make_language_model(CACHE)):
        print(f"{'Reused' if weights.reused else 'Converted'}: {weights.path}")
    write_words(CACHE, seed=0)
    write_open_split(CACHE, num_held_out_images=500, seed=0)
    with connected(words.cluster, storage_path=words.run.storage_path) as resources:
        spoken = train(words, resources)
    language_model = _take_out(Path(spoken.folder.bundle), CACHE / "words-language-model")
    given = ["--model.model_name_or_path", str(language_model)]
    given += ["--data.image_folder", str(easy_vqa.image_folder("train"))]
    return sweep([_RECIPE, *given, *arguments])


def _take_out(bundle: Path, folder: Path) -> Path:
    """Copy a bundle's language model with its tokenizer, without its projector, whose type the sweep varies."""
    shutil.copytree(bundle / "language_model", folder, dirs_exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(bundle / name, folder)
    return folder


if __name__ == "__main__":
    run_command(main)
