#!/usr/bin/env python
"""Time and memory of planning a run of 1, 10 and 100 million samples: lengths, plan, windows of the stream, ledger.

python tests/benchmarks/bench_plan.py --output tests/benchmarks/results/plan.json

Lengths are synthetic; everything else is what a run does, each part in a process of its own, as in a run:

lengths   written as they are counted, shard by shard, with the samples' ids (once for all runs of the same data)
driver    opens the lengths, builds the plan and its hash
manager   lists the windows of all steps for Ray Data; then again from the middle, as a resume does
reader    packs one window and finds its records, at the beginning, in the middle and at the end
ledger    every step's ids and metrics, flushed at every 500th step
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

SIZES = (1_000_000, 10_000_000, 100_000_000)
SAMPLES_PER_SHARD = 1024
BATCH = 128
ROW_LENGTH = 4096
WORLD_SIZE = 8
SAVE_STEPS = 500
MOST_GB, MOST_SECONDS = 4.0, 120.0
GIB = 2**30
PARTS = ("lengths", "driver", "manager", "reader", "ledger")


def main() -> None:
    """Run every part at every size, print and keep times and peaks, and plot them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--folder", type=Path, help="where the files are written for the time of the benchmark")
    parser.add_argument("--part", choices=PARTS, help="(used by the benchmark itself)")
    options = parser.parse_args()
    if options.part:
        found = globals()[f"run_{options.part}"](options.folder, options.sizes[0])
        print(json.dumps(found | {"process_cpu_seconds": round(time.process_time(), 2)}))
        return
    load = os.getloadavg()[0]
    found = {size: measure(size, options.folder) for size in options.sizes}
    largest = found[max(found)]
    planning = sum(largest[part]["seconds"] for part in ("driver", "manager"))
    result = {
        "command": "python tests/benchmarks/bench_plan.py",
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}",
        "load_average_before": round(load, 1),
        "samples": found,
        "planning_seconds": round(planning, 1),
        "planning_peak_gib": max(largest[part]["peak_gib"] for part in ("driver", "manager")),
        "targets": {"planning_seconds": MOST_SECONDS, "planning_peak_gib": MOST_GB},
    }
    from outcome import keep_result

    keep_result(result, options.output)
    if options.output:
        plot(found, options.output.with_suffix(".png"))


def measure(size: int, folder: Path | None) -> dict[str, dict[str, float]]:
    """Return the seconds and the peak of each part at one size."""
    found = {}
    with tempfile.TemporaryDirectory(dir=folder) as name:
        for part in PARTS:
            command = [sys.executable, __file__, "--part", part, "--folder", name, "--sizes", str(size)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found[part] = json.loads(done.stdout.splitlines()[-1])
            print(f"{size:>11,} {part:<8} {found[part]}", flush=True)
    return found


def timed(work: Callable[[], object]) -> float:
    """Return the seconds that the work takes."""
    start = time.perf_counter()
    work()
    return round(time.perf_counter() - start, 3)


def peak_gib() -> float:
    """Return the largest resident set of this process so far."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB, 3)


def synthetic_shards(size: int) -> Iterator[tuple[pa.Table, list]]:
    """Yield the lengths of each shard, about as long as LLaVA's mix has them."""
    from llava_ray.data.token_lengths import SCHEMA

    draw = np.random.default_rng(0)
    for shard, first in enumerate(range(0, size, SAMPLES_PER_SHARD)):
        count = min(SAMPLES_PER_SHARD, size - first)
        numbers = np.arange(first, first + count)
        num_tokens = np.clip(draw.lognormal(6.4, 0.5, count), 40, 2048).astype(np.int32)
        columns = [
            np.full(count, shard, np.int32),
            np.arange(count, dtype=np.int32),
            np.zeros(count, np.int32),
            pc.cast(pa.array(numbers + 100_000_000), pa.string()),
            num_tokens,
            num_tokens // 3,
            (draw.random(count) < 0.9).astype(np.int32),
            np.zeros(count, bool),
        ]
        yield pa.table([pa.array(c, f.type) for c, f in zip(columns, SCHEMA, strict=True)], schema=SCHEMA), []


def run_lengths(folder: Path, size: int) -> dict[str, float]:
    """Write the lengths of all samples."""
    from llava_ray.data.lengths import _write_lengths
    from llava_ray.data.token_lengths import LENGTHS_FILE

    with (folder / LENGTHS_FILE).open("wb") as stream:
        seconds = timed(lambda: _write_lengths(stream, synthetic_shards(size)))
    mb = round((folder / LENGTHS_FILE).stat().st_size / 1e6, 1)
    return {"seconds": seconds, "peak_gib": peak_gib(), "file_mb": mb}


def open_plan(folder: Path) -> tuple:
    """Return the lengths and the plan over them."""
    from llava_ray.data.plan import Plan
    from llava_ray.data.token_lengths import TokenLengths

    lengths = TokenLengths.open(str(folder))
    return lengths, Plan(lengths.column("num_tokens"), lengths.column("shard"), BATCH, 1, seed=42, shuffle_window=4)


def run_driver(folder: Path, size: int) -> dict[str, float]:
    """Open the lengths, build the plan and compute its hash."""
    start = time.perf_counter()
    _, plan = open_plan(folder)
    opened = round(time.perf_counter() - start, 3)
    order = timed(lambda: plan.order(0))
    hashing = timed(lambda: plan.hash)
    assert len(plan.num_tokens) == size
    seconds = round(opened + hashing, 3)  # the order is part of the hash
    return {"seconds": seconds, "peak_gib": peak_gib(), "open_seconds": opened, "order_seconds": order}


def run_manager(folder: Path, size: int) -> dict[str, float]:
    """List the windows of all steps, and those after the middle."""
    from llava_ray.data.descriptors import plan_windows

    _, plan = open_plan(folder)
    windows: list = []

    def lay_out(first: int) -> None:
        windows[:] = plan_windows(plan, range(first, plan.num_steps), ROW_LENGTH, WORLD_SIZE)

    seconds = timed(lambda: lay_out(0))
    num_windows, peak = len(windows), peak_gib()
    resumed = timed(lambda: lay_out(plan.num_steps // 2))
    return {"seconds": seconds, "peak_gib": peak, "windows": num_windows, "resume_seconds": resumed}


def run_reader(folder: Path, size: int) -> dict[str, float]:
    """Pack single windows."""
    from llava_ray.data.descriptors import describe_window, plan_windows

    lengths, plan = open_plan(folder)
    windows = list(plan_windows(plan, range(plan.num_steps), ROW_LENGTH, WORLD_SIZE))
    chosen = [windows[0], windows[len(windows) // 2], windows[-1]] * 3
    pack = partial(describe_window, lengths=lengths, row_length=ROW_LENGTH, world_size=WORLD_SIZE)
    median = round(statistics.median(timed(partial(pack, window)) for window in chosen), 4)
    return {"seconds": median, "peak_gib": peak_gib(), "samples_in_window": sum(windows[0]["sizes"])}


def run_ledger(folder: Path, size: int) -> dict[str, float]:
    """Record all steps and open the files again, as a resume does."""
    from llava_ray.train.step_file import StepFile

    ledger, metrics = (StepFile(str(folder / f"{name}.jsonl")) for name in ("ledger", "metrics"))
    num_steps, flushes = size // BATCH, []
    start = time.perf_counter()
    for step in range(num_steps):
        numbers = range(100_000_000 + BATCH * step, 100_000_000 + BATCH * (step + 1))
        ledger.add(step, {"samples": sorted(map(str, numbers))})
        metrics.add(step, {"loss": 1.0 / (step + 1), "learning_rate": 2e-5, "samples_per_second": 12.5})
        if (step + 1) % SAVE_STEPS == 0:
            flushes.append(timed(lambda: (ledger.flush(), metrics.flush())))
    seconds = round(time.perf_counter() - start, 3)
    third = max(1, len(flushes) // 3)
    return {
        "seconds": seconds,
        "peak_gib": peak_gib(),
        "file_mb": round((folder / "ledger.jsonl").stat().st_size / 1e6, 1),
        "first_flush_seconds": round(statistics.median(flushes[:third]), 4),
        "last_flush_seconds": round(statistics.median(flushes[-third:]), 4),
        "reopen_seconds": timed(lambda: StepFile(str(folder / "ledger.jsonl")).rewind(num_steps // 2)),
    }


def plot(found: dict[int, dict[str, dict[str, float]]], path: Path) -> None:
    """Plot seconds and peak memory of each part against the number of samples."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4))
    for axis, key, name in zip(axes, ("seconds", "peak_gib"), ("seconds", "peak memory, GiB"), strict=True):
        for part in PARTS:
            axis.plot(list(found), [parts[part][key] for parts in found.values()], marker="o", label=part)
        axis.set(xscale="log", yscale="log", xlabel="samples", ylabel=name)
        axis.grid(alpha=0.3)
    axes[1].axhline(MOST_GB, color="gray", linestyle="--")
    axes[0].axhline(MOST_SECONDS, color="gray", linestyle="--")
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    main()
