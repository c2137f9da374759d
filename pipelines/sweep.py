#!/usr/bin/env python
"""Search a space of settings with many fine-tuning runs, early stopping and held-out evaluation.

python pipelines/sweep.py pipelines/recipes/sweep/llava_v1_5_7b.toml --data.data_path blip_558k.json …
python pipelines/sweep.py RECIPE --dry-run [--gpu_memory_gib 40]     # trials, steps, memory, time; starts nothing
ray job submit --working-dir . -- python pipelines/sweep.py RECIPE --sweep.num_trials 32

The same command resumes an interrupted sweep. The best run's model and recipe are in the sweep's folder.
"""

import json
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from llava_ray.config.sweep_recipes import load_sweep
from llava_ray.worker_forks import prepare_forks, start_forks
from pipelines.command import run_command, split_dry_run
from pipelines.places import check_run_models, check_run_places
from pipelines.prerequisites import check_prerequisites, missing_models
from pipelines.sweep_stop import leaving

if TYPE_CHECKING:
    from pipelines.sweep_results import Sweep


def main(arguments: Sequence[str]) -> "Sweep | None":
    """Prepare shared inputs, run the trials, export the best one, write the report, and print their paths.

    With ``--dry-run`` only say what would be done.
    """
    asked, arguments = split_dry_run(arguments)
    config, space = load_sweep(arguments)
    check_prerequisites(config, missing_models(config))
    if asked.dry_run:
        check_run_models(config, space)
        from llava_ray.sweep.dry_run import describe_sweep

        for line in describe_sweep(config, space, asked.gpu_memory_gib):
            print(line)
        return None
    check_run_places(config, space)
    prepare_forks(config)
    from llava_ray.runtime import connected, local_runs, start_ahead

    # Ray Train asks the dashboard whether the controller of a trial that Tune has ended is alive.
    local: dict[str, Any] = {"runs": local_runs(config.cluster), "dashboard": True}
    start_ahead(config.cluster, **local)
    from llava_ray.report.charts import check_plotting
    from llava_ray.sweep.folder import open_sweep
    from llava_ray.sweep.search import search
    from llava_ray.sweep.shared import absolute_space, check_sweep, common_config, share
    from llava_ray.sweep.trial import finetune_trial
    from pipelines.sweep_results import closing_sweep, print_sweep, save_sweep, start_sweep_run

    start_forks()
    check_plotting()
    check_sweep(config, space)
    space = absolute_space(space)
    print(config.model_dump_json(indent=1, exclude_defaults=True))
    print(json.dumps({"space": space.model_dump(exclude_defaults=True)["dimensions"]}, indent=1), flush=True)
    folder = open_sweep(config, space)
    start = time.perf_counter()
    tracked = start_sweep_run(config, folder)
    cluster = connected(config.cluster, **local, quiet=True, storage_path=config.run.storage_path)
    with leaving(), closing_sweep(tracked), cluster as resources:
        common = common_config(config, folder, tracked.tracking_uri, tracked.run_id)
        num_steps = share(common.base, space, resources)
        where = {"tracking_uri": tracked.tracking_uri, "experiment_name": config.tracking.experiment_name}
        searched = search(common, space, folder, resources, finetune_trial, num_steps, where)
    finished = save_sweep(config, common, space, searched, time.perf_counter() - start, tracked)
    print_sweep(finished)
    return finished


if __name__ == "__main__":
    run_command(main)
