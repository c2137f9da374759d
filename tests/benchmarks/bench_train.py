#!/usr/bin/env python
"""How much of the processor's matrix rate training uses: padded batches, our packing in bare torch, and whole runs.

python tests/benchmarks/bench_train.py --output tests/benchmarks/results/train.json
python tests/benchmarks/bench_train.py --only baseline-fp32,packed-fp32,run-1-fp32     # some of the rows
python tests/benchmarks/bench_train.py --only packed-fp32 --profile                    # and where a step's time goes

Rates are medians over steps of **useful** operations a second: the tower, causal attention within each sample, the head
where tokens are supervised, backward passes where there are gradients. The matrix rate is measured in each process of
the same run. Takes about ten minutes on two cores.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.update(RAY_AUTH_MODE="disabled", RAY_USAGE_STATS_ENABLED="0", TOKENIZERS_PARALLELISM="false")
sys.path.insert(0, str(Path(__file__).parents[1]))

ROOT = Path(__file__).parents[2]
NUM_WARM = 2
# Name → how it is computed, workers, bf16, features.
ROWS: dict[str, tuple[str, int, bool, str]] = {
    "baseline-fp32": ("padded", 1, False, "inline"),
    "packed-fp32": ("packed", 1, False, "inline"),
    "run-1-fp32": ("run", 1, False, "inline"),
    "run-2-fp32": ("run", 2, False, "inline"),
    "baseline-bf16": ("padded", 1, True, "inline"),
    "packed-bf16": ("packed", 1, True, "inline"),
    "packed-bf16-cached": ("packed", 1, True, "cached"),
    "run-1-bf16": ("run", 1, True, "inline"),
    "run-2-bf16": ("run", 2, True, "inline"),
    "run-1-bf16-cached": ("run", 1, True, "cached"),
    "run-2-bf16-cached": ("run", 2, True, "cached"),
}


def main() -> None:
    """Measure the rows, each in processes of its own; print and keep rates, shares and ratios."""
    options = parse_options()
    if options.row:
        print(json.dumps(time_bare(options)))
        return
    chosen = options.only.split(",") if options.only else list(ROWS)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        from train_fixture import make_fixture

        make_fixture(Path(folder), 8 * options.steps)
        found = {}
        for name in chosen:
            started = time.time()
            found[name] = measure(name, Path(folder), options)
            print(f"{name}: {found[name]} in {time.time() - started:.0f} s", flush=True)
    from outcome import keep_result

    keep_result(summarize(found, options), options.output)


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help=f"rows to measure, with commas: {', '.join(ROWS)}")
    parser.add_argument("--steps", type=int, default=8, help=f"steps of each row; the first {NUM_WARM} do not count")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of the bare rows")
    parser.add_argument(
        "--profile", action="store_true", help="print where the last step of a bare row spends its time"
    )
    parser.add_argument("--folder", type=Path, help="where the fixture is written; default: the temporary folder")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--row", help=argparse.SUPPRESS)
    return parser.parse_args()


def measure(name: str, folder: Path, options: argparse.Namespace) -> dict[str, float]:
    """Measure one row in a process of its own."""
    way, num_workers, bf16, features = ROWS[name]
    if way == "run":
        return time_run(folder, num_workers, bf16, features, options.steps)
    command = [sys.executable, __file__, "--row", name, "--folder", str(folder)]
    command += ["--steps", str(options.steps), "--threads", str(options.threads)]
    command += ["--profile"] if options.profile else []
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT)
    *lines, last = done.stdout.splitlines()
    print("\n".join(line for line in lines if options.profile))
    result: dict[str, float] = json.loads(last)
    return result


def time_bare(options: argparse.Namespace) -> dict[str, float]:
    """Time the steps of a row in this process."""
    import torch
    from bare_training import time_steps
    from train_fixture import make_config

    torch.set_num_threads(options.threads)
    way, num_workers, bf16, features = ROWS[options.row]
    config = make_config(options.folder, bf16=bf16, features=features, num_workers=num_workers, num_steps=options.steps)
    trace = options.folder / f"{options.row}.trace.json" if options.profile else None
    return time_steps(config, way=way, num_steps=options.steps, num_warm=NUM_WARM, trace=trace)


def time_run(folder: Path, num_workers: int, bf16: bool, features: str, num_steps: int) -> dict[str, float]:
    """Time the steps of a run that a user would start, by its own metrics."""
    from bare_training import count_work, read_steps
    from samples import write_recipe
    from train_fixture import make_config

    from llava_ray.model.assembly import assemble
    from llava_ray.model.freezing import freeze

    config = make_config(folder, bf16=bf16, features=features, num_workers=num_workers, num_steps=num_steps)
    recipe = write_recipe(folder, config)
    name = str(config.run.name)
    command = [sys.executable, "pipelines/finetune.py", str(recipe), "--run.name", name]
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
    lines = (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()
    seconds = [json.loads(line)["step_seconds"] for line in lines][NUM_WARM:]
    parts = assemble(config.model, "square")
    freeze(parts.llava, parts.tower, config.model)
    steps, _ = read_steps(config, parts, num_steps)
    work = [count_work(parts, batches, inline=features == "inline") for batches in steps[NUM_WARM:]]
    return {
        "useful_gflops": statistics.median(work_ / took / 1e9 for work_, took in zip(work, seconds, strict=True)),
        "step_seconds": statistics.median(seconds),
    }


def summarize(found: dict[str, dict[str, float]], options: argparse.Namespace) -> dict[str, Any]:
    """Return rates with their shares of the matrix rate, and the ratios that have targets."""
    rates: dict[str, list[float]] = {"fp32": [], "bf16": []}
    for name, row in found.items():
        if "matrix_gflops" in row:
            rates["bf16" if "bf16" in name else "fp32"].append(row["matrix_gflops"])
    matrix = {dtype: statistics.median(values) for dtype, values in rates.items() if values}
    rows = {
        name: {key: round(value, 3) for key, value in row.items()}
        | {
            f"share_of_matrix_rate_{dtype}": round(row["useful_gflops"] / rate, 3)
            for dtype, rate in matrix.items()
            if dtype in name
        }
        for name, row in found.items()
    }
    targets = [
        ("fp32 run / baseline", "run-1-fp32", "baseline-fp32", 1.8),
        ("fp32 run / packed in bare torch", "run-1-fp32", "packed-fp32", 0.9),
        ("fp32 1 worker / 2 workers", "run-1-fp32", "run-2-fp32", 0.95),
        ("bf16 run / packed in bare torch", "run-1-bf16", "packed-bf16", 0.9),
        ("bf16 1 worker / 2 workers", "run-1-bf16", "run-2-bf16", 0.95),
    ]
    ratios = {
        label: {"ratio": round(found[above]["useful_gflops"] / found[below]["useful_gflops"], 3), "target": target}
        for label, above, below, target in targets
        if above in found and below in found
    }
    for one, other in (("run-1-bf16-cached", "run-1-bf16"), ("run-2-bf16-cached", "run-2-bf16")):
        if one in found and other in found:  # the tower's work is saved: seconds, not rates
            saved = found[other]["step_seconds"] / found[one]["step_seconds"]
            ratios[f"{one} / inline, samples"] = {"ratio": round(saved, 3), "target": 1.1}
    from outcome import describe_processor

    return {
        "command": " ".join(sys.argv),
        "processor": describe_processor(),
        "threads": options.threads,
        "matrix_gflops": {dtype: round(rate, 1) for dtype, rate in matrix.items()},
        "rows": rows,
        "ratios": ratios,
    }


if __name__ == "__main__":
    main()
