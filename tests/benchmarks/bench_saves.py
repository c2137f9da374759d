#!/usr/bin/env python
"""How long training stands still for a checkpoint of a model of 1 GB: written at once, and staged.

A real engine (DeepSpeed, AdamW, one process) takes steps and saves in both ways in the same run. A staged save's stall
is the copy in memory and what the steps take longer while a thread writes; the target is 3 % of the default interval
of ``train.save_steps`` steps.

python tests/benchmarks/bench_saves.py --output tests/benchmarks/results/saves.json
"""

import argparse
import os
import platform
import resource
import shutil
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

WIDTH, VOCABULARY = 1024, 8192
TARGET = 0.03


def main() -> None:
    """Save in both ways and print what it cost."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--gigabytes", type=float, default=1.0, help="of the model's weights in fp32")
    parser.add_argument("--tokens", type=int, default=512, help="of a step")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--zero_stage", type=int, default=2)
    options = parser.parse_args()
    os.environ |= {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "DS_ACCELERATOR": "cpu",
    }
    from commands import free_port

    os.environ["MASTER_PORT"] = str(free_port())
    with tempfile.TemporaryDirectory() as folder:
        result = measure(Path(folder), options)
    from outcome import keep_result

    keep_result(result, options.output)


def measure(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Return the medians of all rounds, in seconds."""
    engine, checkpointer, size = build(folder, options)
    plain = [take_step(engine, options.tokens) for _ in range(options.rounds + 1)][1:]  # the first also allocates
    at_once, staged = [], []
    for number in range(options.rounds):
        at_once.append(save_at_once(checkpointer, folder / f"at-once-{number}"))
        plain += [take_step(engine, options.tokens) for _ in range(2)]
        staged.append(save_staged(engine, checkpointer, folder / f"staged-{number}", options.tokens))
    step = statistics.median(plain)
    from llava_ray.config.train import TrainConfig

    interval = step * TrainConfig().save_steps
    copy = statistics.median(row["copy"] for row in staged)
    slowed = statistics.median(max(0.0, sum(row["steps"]) - step * len(row["steps"])) for row in staged)
    return {
        "command": " ".join(sys.argv),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}",
        "zero_stage": options.zero_stage,
        "weights_gb": round(size / 1e9, 3),
        "step_seconds": round(step, 3),
        "interval_seconds": round(interval, 1),
        "at_once": {
            "stall_seconds": round(statistics.median(at_once), 2),
            "share_of_interval": round(statistics.median(at_once) / interval, 4),
        },
        "staged": {
            "copy_seconds": round(copy, 2),
            "slowed_seconds": round(slowed, 2),
            "writing_seconds": round(statistics.median(row["writing"] for row in staged), 2),
            "stall_seconds": round(copy + slowed, 2),
            "share_of_interval": round((copy + slowed) / interval, 4),
        },
        "target": TARGET,
        "peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
    }


def build(folder: Path, options: argparse.Namespace) -> tuple[Any, Any, int]:
    """Return an engine around a random model of the size asked for, what saves it, and the size in bytes."""
    import torch
    from fakes import make_language_model
    from samples import small_run

    from llava_ray.train.allocation import keep_freed_memory
    from llava_ray.train.checkpoints import Checkpointer
    from llava_ray.train.engine import build_engine, load_parts
    from llava_ray.train.settings import LoopSettings

    keep_freed_memory()
    config = small_run(folder, num_samples=2, **{"train.zero_stage": options.zero_stage, "cluster.num_workers": 1})
    a_layer = 4 * WIDTH**2 + 3 * WIDTH * 4 * WIDTH
    layers = max(1, round((options.gigabytes * 1e9 / 4 - 2 * VOCABULARY * WIDTH) / a_layer))
    shape = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_hidden_layers": layers}
    make_language_model(
        folder / "large", vocab_size=VOCABULARY, num_attention_heads=16, num_key_value_heads=16, **shape
    )  # type: ignore[arg-type]
    config = config.replaced({"model.model_name_or_path": str(folder / "large")})
    parts = load_parts(config, torch.device("cpu"))
    engine = build_engine(parts, config, 1000)
    size = sum(parameter.nbytes for parameter in parts.llava.parameters())
    settings = LoopSettings(config, None, 1000, 1000, "plan", "data", "", "", 1, None)  # type: ignore[arg-type]
    return engine, Checkpointer(engine, parts, settings), size


def take_step(engine: Any, num_tokens: int) -> float:
    """Take a step on random tokens and return its seconds."""
    import torch

    from llava_ray.model.network.sample_attention import SampleBorders

    start = time.perf_counter()
    ids = torch.randint(5, 300, (1, num_tokens))
    predicting = torch.arange(0, num_tokens - 1, 2)
    borders = SampleBorders.of([num_tokens], torch.device("cpu"))
    logits = engine(ids, torch.arange(num_tokens)[None], predicting, borders=borders)
    engine.backward(torch.nn.functional.cross_entropy(logits.float(), ids[0, predicting + 1]), scale_wrt_gas=False)
    engine.step()
    return time.perf_counter() - start


def save_at_once(checkpointer: Any, folder: Path) -> float:
    """Write a checkpoint while training waits, as before, and return the seconds; the copy to storage never waited."""
    start = time.perf_counter()
    checkpointer.write(folder, 1)
    seconds = time.perf_counter() - start
    shutil.rmtree(folder)
    return seconds


def save_staged(engine: Any, checkpointer: Any, folder: Path, num_tokens: int) -> dict[str, Any]:
    """Stage a checkpoint, take steps until a thread has written and copied it, and return the seconds of each."""
    start = time.perf_counter()
    writes = checkpointer.stage(folder, 1, 1e18)
    copy = time.perf_counter() - start

    def write() -> None:
        for one in writes:
            one()
        shutil.copytree(folder, folder.with_suffix(".stored"))  # Ray's part

    thread = threading.Thread(target=write)
    thread.start()
    steps = []
    while thread.is_alive():
        steps.append(take_step(engine, num_tokens))
        if not thread.is_alive():
            break
    thread.join()
    writing = time.perf_counter() - start - copy
    shutil.rmtree(folder)
    shutil.rmtree(folder.with_suffix(".stored"))
    return {"copy": copy, "writing": writing, "steps": steps}


if __name__ == "__main__":
    main()
