#!/usr/bin/env python
"""Fine-tune a LLaVA on a Ray cluster, for alignment or instruction tuning, by recipe.

python pipelines/finetune.py pipelines/recipes/finetune/llava_v1_5_7b.toml --data.data_path mix665k.json …
python pipelines/finetune.py RECIPE --dry-run [--gpu_memory_gib 40]     # parts, steps, memory; starts nothing
python pipelines/finetune.py RECIPE --dry-run --cluster_file clusters/a100.yaml     # … and whether it fits there
python pipelines/finetune.py RECIPE --profile 20-22     # a trace of these steps, for ui.perfetto.dev
ray job submit --working-dir . -- python pipelines/finetune.py RECIPE --train.learning_rate 1e-5
"""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llava_ray.config.finetune import FinetuneConfig
from llava_ray.config.mixtures import named_places
from llava_ray.config.model import MODEL_PATHS
from llava_ray.config.recipes import load_recipe
from llava_ray.errors import ConfigError
from llava_ray.worker_forks import prepare_forks, start_forks
from pipelines.command import run_command, split_dry_run
from pipelines.places import check_run_places
from pipelines.prerequisites import check_prerequisites, missing_models

if TYPE_CHECKING:
    from llava_ray.shared_storage import Places
    from llava_ray.train.finished_run import FinishedRun


_STEPS = "give a step as metrics.jsonl numbers it, or the first and the last of several: --profile 20-22"
_PROJECTOR = "model.pretrain_mm_mlp_adapter"


def main(arguments: Sequence[str]) -> "FinishedRun | None":
    """Prepare the data, fine-tune and print the results' paths, or describe the run with ``--dry-run``."""
    asked, arguments = split_dry_run(arguments)
    profile, arguments = split_profile(arguments)
    config = load_recipe(FinetuneConfig, arguments)
    missing = missing_models(config)
    if asked.dry_run:
        # A projector's size is known without its file, that of a whole model from an earlier stage is not.
        check_prerequisites(config, {key: command for key, command in missing.items() if key != _PROJECTOR})
        from llava_ray.train.planning.dry_run import describe_run

        for line in describe_run(config, asked.gpu_memory_gib, asked.cluster_file):
            print(line)
        if _PROJECTOR in missing:
            print(f"First {missing[_PROJECTOR]}, which makes {config.model.pretrain_mm_mlp_adapter}")
        return None
    check_prerequisites(config, missing)
    check_run_places(config)
    print(config.model_dump_json(indent=1, exclude_defaults=True), flush=True)
    prepare_forks(config)
    from llava_ray.runtime import connected, start_ahead

    start_ahead(config.cluster)
    from llava_ray.data.preparation import prepare_data
    from llava_ray.train.preflight import check_run
    from llava_ray.train.trainer import finetune

    start_forks()
    check_run(config)
    with connected(config.cluster, _shared_places(config), storage_path=config.run.storage_path) as resources:
        prepared = prepare_data(config.data)
        finished = finetune(config, prepared, resources, profile=profile)
    _print_run(finished)
    return finished


def split_profile(arguments: Sequence[str]) -> tuple[tuple[int, int] | None, list[str]]:
    """Parse ``--profile STEPS`` from a command line, and return its first and last step, and the other arguments.

    Raises ConfigError unless STEPS is a step's number, or the first and the last with a dash between.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--profile")
    try:
        asked, others = parser.parse_known_args(list(arguments))
    except argparse.ArgumentError as error:
        raise ConfigError(f"{error}; {_STEPS}") from error
    if asked.profile is None:
        return None, others
    found = re.fullmatch(r"(\d{1,12})(?:-(\d{1,12}))?", asked.profile)
    first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
    if last < first:
        raise ConfigError(f"--profile {asked.profile}: {_STEPS}")
    return (first, last), others


def _shared_places(config: FinetuneConfig) -> "Places":
    """Return the paths that all nodes have to see."""
    from llava_ray.shared_storage import Places

    data = config.data
    parts = [getattr(config.model, key.removeprefix("model.")) for key in MODEL_PATHS]
    return Places.of([config.run.storage_path, data.cache_dir], [*named_places(data).values(), *parts])


def _print_run(finished: "FinishedRun") -> None:
    """Print the results and their paths."""
    from llava_ray.tracking import describe_page

    loss = finished.metrics.get("loss", float("nan"))
    print(f"{'Finished before' if finished.reused else 'Finished'}: {finished.num_steps} steps, last loss {loss:.4f}")
    best = "" if finished.best_step is None else f"  (the best, after step {finished.best_step})"
    print(f"  model    {finished.folder.bundle}{best}")
    print(f"  ledger   {finished.folder.path}/ledger.jsonl")
    print(f"  metrics  {finished.folder.path}/metrics.jsonl")
    if (report := Path(finished.folder.path, "report.html")).exists():
        print(f"  report   {report}")
    page = describe_page(finished.tracking_uri, finished.mlflow_run_id, finished.mlflow_experiment_id)
    print(f"  mlflow   {page}")


if __name__ == "__main__":
    run_command(main)
