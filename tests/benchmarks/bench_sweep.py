#!/usr/bin/env python
"""``make sweep`` beside the same trials run one by one to their ends, through finetune.py with inline vision.

python tests/benchmarks/bench_sweep.py --output tests/benchmarks/results/sweep.json

Both start with the quickstart's words stage and prepared data; the sweep computes the features, runs two trials at a
time and stops early, each single run uses both cores. The single runs tell which settings are the best in truth, and
whether the sweep has kept them. Takes half an hour on two slow cores; ``make quickstart`` comes first.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

os.environ.update(RAY_AUTH_MODE="disabled", RAY_USAGE_STATS_ENABLED="0")

from outcome import keep_result

from llava_ray.config.space import SweepConfig
from llava_ray.config.sweep_recipes import load_sweep
from llava_ray.quickstart import easy_vqa
from llava_ray.quickstart.easy_vqa_records import write_open_split
from llava_ray.sweep.sampling import TrialSettings, settings_key
from llava_ray.sweep.searching import list_trial_arguments
from pipelines.quickstart import CACHE

ROOT = Path(__file__).parents[2]
RECIPE = "pipelines/recipes/sweep/quickstart.toml"
NUM_CORES = 2
TARGET_SPEED, TARGET_SAVED = 2.0, 0.5
# What the single runs have otherwise than the trials.
ALONE = {"data.vision_features": "inline", "cluster.num_workers": NUM_CORES, "cluster.cpus_per_worker": "auto"}


def main() -> None:
    """Time both ways; print and keep the figures."""
    options = parse_options()
    os.chdir(ROOT)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:NUM_CORES])
    given = ["--data.image_folder", str(easy_vqa.image_folder("train")), *options.flags]
    config, space = load_sweep([RECIPE, *given])
    warm_up(config, given)
    swept, swept_busy = timed(["pipelines/quickstart_sweep.py", "--run.restart", "True", *options.flags])
    report = json.loads(Path(config.run.storage_path, "sweep/report.json").read_text())
    ends: list[dict[str, Any]] = []
    alone, busy = 0.0, []
    for number, trial in enumerate(list_trial_arguments(space, config.sweep, config.base)):
        seconds, share, end = run_alone(trial, given, options.folder, f"alone-{number}")
        alone += seconds
        busy.append(share * seconds)
        ends.append({"settings": trial["settings"], "seconds": round(seconds, 1)} | end)
    best = min(ends, key=lambda row: (-row["held_out_accuracy"], row["held_out_loss"]))
    kept = next(row for row in ends if settings_key(row["settings"]) == settings_key(report["best"]["settings"]))
    result = {
        "num_trials": len(ends),
        "sweep_seconds": round(swept, 1),
        "one_by_one_seconds": round(alone, 1),
        "ratio": round(alone / swept, 2),
        "target": TARGET_SPEED,
        "steps_saved": report["steps_saved"],
        "target_steps_saved": TARGET_SAVED,
        "busy_cores_sweep": round(swept_busy, 2),
        "busy_cores_one_by_one": round(sum(busy) / alone, 2),
        "best_in_truth": best,
        "best_of_sweep_in_truth": kept,
        "true_best_kept": settings_key(best["settings"]) == settings_key(kept["settings"]),
        "one_by_one": ends,
        "states": report["states"],
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}",
    }
    keep_result(result, options.output)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("runs/bench_sweep"), help="made, and left for a look")
    parser.add_argument("--output", type=Path)
    options, options.flags = parser.parse_known_args()
    return options


def warm_up(config: SweepConfig, given: list[str]) -> None:
    """Prepare the data and drop features: neither way pays for the first, or gains by an earlier run's."""
    write_open_split(CACHE, num_held_out_images=500, seed=0)
    shutil.rmtree(Path(config.data.cache_dir, "features"), ignore_errors=True)
    data = ["--data.data_path", "--data.max_samples", "--data.samples_per_shard", "--data.cache_dir"]
    values = [config.data.data_path, config.data.max_samples, config.data.samples_per_shard, config.data.cache_dir]
    flags = [word for key, value in zip(data, values, strict=True) for word in (key, str(value))]
    run(["pipelines/prepare.py", *flags, *given])


def run_alone(
    trial: dict[str, Any], given: list[str], folder: Path, name: str
) -> tuple[float, float, dict[str, float]]:
    """Run one trial to its end; return seconds, busy cores and what held-out samples said last."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(folder / name, ignore_errors=True)
    recipe = folder / f"{name}.toml"
    text = (ROOT / RECIPE).read_text()
    recipe.write_text("[model]" + text.partition("[model]")[2])  # a run knows neither space nor sweep
    changes: TrialSettings = {**ALONE, **trial["settings"], "train.seed": trial["seed"], "run.name": name}
    changes["run.storage_path"] = str(folder)
    flags = [word for key, value in changes.items() for word in (f"--{key}", str(value))]
    seconds, busy = timed(["pipelines/finetune.py", str(recipe), *given, *flags])
    rows = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    last = next(row for row in reversed(rows) if "held_out_loss" in row)
    return seconds, busy, {key: last[key] for key in ("held_out_loss", "held_out_accuracy")}


def timed(command: list[str]) -> tuple[float, float]:
    """Run a command; return its seconds and how many cores this machine had busy meanwhile."""
    start, before = time.perf_counter(), busy_seconds()
    run(command)
    seconds = time.perf_counter() - start
    return seconds, (busy_seconds() - before) / seconds


def run(command: list[str]) -> None:
    """Run a pipeline, and stop if it fails."""
    subprocess.run([sys.executable, *command], check=True, stdin=subprocess.DEVNULL)


def busy_seconds() -> float:
    """Return the seconds that this machine's cores have not been idle, in all."""
    names = ("user", "nice", "system", "idle", "iowait")
    values = dict(zip(names, map(int, Path("/proc/stat").read_text().split()[1:6]), strict=True))
    return (values["user"] + values["nice"] + values["system"]) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    main()
