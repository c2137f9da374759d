#!/usr/bin/env python
"""What sweeping itself costs: a hundred trials without training, and the driver's memory as they go by.

python tests/benchmarks/bench_sweep_overhead.py --output tests/benchmarks/results/sweep_overhead.json --plot plot.html
"""

import argparse
import os
import platform
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

os.environ.update(RAY_AUTH_MODE="disabled", RAY_USAGE_STATS_ENABLED="0", OMP_NUM_THREADS="1")

import psutil
import ray
from outcome import keep_result
from ray import tune

from llava_ray.config.finetune import FinetuneConfig
from llava_ray.config.space import Space, SweepConfig
from llava_ray.report.pieces import LineChart, Report, Section, Series
from llava_ray.report.rendering import write_report
from llava_ray.runtime import Resources
from llava_ray.sweep.ledger import read_ledger
from llava_ray.sweep.search import search

NUM_STEPS = 40
LOOKS = (10, 20, 30, 40)
MAX_GROWTH_MB = 100.0


def stub(config: FinetuneConfig, resources: Resources, until: int) -> None:
    """Report a curve that depends on the learning rate, and train nothing."""
    del resources, until
    for step in LOOKS:
        loss = abs(config.train.learning_rate - 3e-3) + 1 / step
        tune.report({"step": step, "num_steps": NUM_STEPS, "held_out_loss": loss, "held_out_accuracy": 1 - loss})
    last = {"step": NUM_STEPS, "num_steps": NUM_STEPS, "held_out_loss": loss, "held_out_accuracy": 1 - loss}
    tune.report({"ended": "finished", "reason": ""} | last)


def main() -> None:
    """Run the trials, sample the driver's memory, print and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num-trials", type=int, default=100)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--plot", type=Path, help="an HTML page")
    options = parser.parse_args()
    space = Space.parsed({"dimensions": {"train.learning_rate": {"log_uniform": [1e-4, 1e-1]}}})
    ray.init(address="local", num_cpus=8, include_dashboard=True, log_to_driver=False)
    samples: list[tuple[float, int, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        config = SweepConfig.parsed(
            {
                "model": {"model_name_or_path": "none"},
                "data": {"data_path": "none"},
                "held_out": {"path": "none"},
                "sweep": {"num_trials": options.num_trials, "max_concurrent_trials": 4, "scheduler": "asha"},
                "run": {"name": "stub", "storage_path": folder},
                "train": {"save_steps": 10},
            }
        )
        over = threading.Event()
        watch = threading.Thread(target=sample, args=(over, folder, samples), daemon=True)
        watch.start()
        start = time.perf_counter()
        searched = search(
            config, space, folder, Resources(1, 1.0, use_gpu=False, accelerator_type=None), stub, NUM_STEPS
        )
        seconds = time.perf_counter() - start
        over.set()
        watch.join()
    ray.shutdown()
    early = [mb for _, done, mb in samples if 10 <= done < 20]
    late = [mb for _, done, mb in samples if done >= options.num_trials - 10]
    growth = (sum(late) / len(late) - sum(early) / len(early)) if early and late else float("nan")
    result: dict[str, Any] = {
        "num_trials": len(searched.trials),
        "seconds": round(seconds, 1),
        "seconds_per_trial": round(seconds / len(searched.trials), 2),
        "driver_mb_at_10_to_20_trials": round(sum(early) / len(early), 1) if early else None,
        "driver_mb_at_the_end": round(sum(late) / len(late), 1) if late else None,
        "growth_mb": round(growth, 1),
        "growth_kb_per_trial": round(1000 * growth / options.num_trials, 1),
        "target_growth_mb": MAX_GROWTH_MB,
        "clean": not searched.left,
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}",
    }
    keep_result(result, options.output)
    if options.plot:
        write_report(options.plot, page(result, samples))


def sample(over: threading.Event, folder: str, samples: list[tuple[float, int, float]]) -> None:
    """Note (seconds, trials started, this process's own MB) twice a second."""
    start, process = time.perf_counter(), psutil.Process()
    while not over.wait(0.5):
        info = process.memory_info()
        samples.append((time.perf_counter() - start, len(read_ledger(folder)), (info.rss - info.shared) / 2**20))


def page(result: dict[str, Any], samples: list[tuple[float, int, float]]) -> Report:
    """Plot memory over time and over trials."""
    seconds, trials, memory = ([row[i] for row in samples] for i in range(3))
    by_trials = LineChart("Driver's memory", [Series("own MB", trials, memory)], "trials started", "MB")
    progress = LineChart("Trials over time", [Series("started", seconds, trials)], "seconds", "trials started")
    said = f"{result['num_trials']} trials without training in {result['seconds']} s; {result['growth_mb']} MB growth."
    return Report("What sweeping itself costs", said, [Section("Growth", [by_trials, progress])])


if __name__ == "__main__":
    main()
