#!/usr/bin/env python
"""Peak memory while a model of 1 GB is loaded, above that of the process before; and how long ``inspect`` takes.

python tests/benchmarks/bench_loading.py --output tests/benchmarks/results/loading.json
"""

import argparse
import gc
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

TARGET_RATIO = 1.2  # of the weights in memory
TARGET_SECONDS = 2.0
SAMPLE_SECONDS = 0.002
ROOT = Path(__file__).parents[2]

# Stored in, loaded in, of which layout.
CASES = [
    ("float32", "float32", "original"),
    ("float16", "float16", "original"),
    ("float16", "float32", "original"),
    ("float16", "bfloat16", "original"),
    ("float32", "float32", "bundle"),
    ("float16", "float32", "bin"),
    ("float16", "float16", "bin"),
]
INSPECT = (
    "import sys; from pathlib import Path; from llava_ray.model.formats.inspection import inspect, render_inspection;"
    "print(render_inspection(inspect(Path(sys.argv[1])))); assert 'torch' not in sys.modules"
)


def main() -> None:
    """Load each case in a process of its own, inspect a folder the size of LLaVA-1.5-7B, and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--load", nargs=3, help="(used by the benchmark itself) load FOLDER TOWER DTYPE")
    options = parser.parse_args()
    if options.load:
        print(json.dumps(measure(*options.load)))
        return
    with tempfile.TemporaryDirectory() as folder:
        cases = [run_case(Path(folder), *case) for case in CASES]
        seconds = time_inspect(Path(folder))
    result = {
        "cases": cases,
        "worst_ratio": max(case["ratio"] for case in cases),
        "target_ratio": TARGET_RATIO,
        "inspect_7b_seconds": seconds,
        "target_seconds": TARGET_SECONDS,
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}",
    }
    from outcome import keep_result

    keep_result(result, options.output)


def run_case(root: Path, stored: str, loaded: str, layout: str) -> dict[str, Any]:
    """Write a model whose weights take 1 GB once loaded, and load it."""
    sys.path.insert(0, str(ROOT / "tests"))
    from fakes import make_language_model, make_vision_tower

    tower, model = root / "tower", root / "model"
    if not tower.exists():
        make_vision_tower(tower)
        make_language_model(tower.with_name("small"))
    write_model(model, tower, stored, layout, num_layers=8 if loaded == "float32" else 17)
    command = [sys.executable, __file__, "--load", str(model), str(tower), loaded]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment())
    shutil.rmtree(model)
    case = {"layout": layout, "stored": stored, "loaded": loaded, **json.loads(done.stdout.splitlines()[-1])}
    print(case, flush=True)
    return case


def write_model(folder: Path, tower: Path, stored: str, layout: str, *, num_layers: int) -> None:
    """Write a random LLaVA 2,048 wide in that layout, in two shards where it is the original's."""
    import torch
    import transformers
    from fakes import make_tokenizer
    from originals import write_original

    from llava_ray.config.model import ModelConfig
    from llava_ray.model.assembly import assemble
    from llava_ray.model.saving import save_bundle

    transformers.utils.logging.disable_progress_bar()
    base = folder.with_name("base")
    config = transformers.LlamaConfig(
        vocab_size=8000,
        hidden_size=2048,
        intermediate_size=2048,
        num_hidden_layers=num_layers,
        num_attention_heads=16,
        bos_token_id=1,
        eos_token_id=2,
    )
    dtype = getattr(torch, stored)
    transformers.LlamaForCausalLM(config).to(dtype).save_pretrained(base)
    make_tokenizer(base)
    parts = assemble(ModelConfig(model_name_or_path=str(base), vision_tower=str(tower)), "pad", dtype=dtype)
    if layout == "bundle":
        save_bundle(folder, parts)
    else:
        write_original(folder, parts, ending="bin" if layout == "bin" else "safetensors", num_shards=2)


def measure(folder: str, tower: str, dtype: str) -> dict[str, float]:
    """Load a folder; return the weights' size and the peak above the process before, in MB."""
    import psutil
    import torch

    import llava_ray.model.loading as loading

    torch.set_num_threads(1)
    # What is imported and allocated once, whatever is loaded, belongs to the process before.
    loading.load_pretrained_model(Path(tower).with_name("small"), vision_tower=tower, version="v1")
    gc.collect()
    process = psutil.Process()
    before = process.memory_info().rss
    peak = [before]
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(SAMPLE_SECONDS):
            peak[0] = max(peak[0], process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    given = {} if (Path(folder) / "llava.json").exists() else {"vision_tower": tower, "version": "v1"}
    parts = loading.load_pretrained_model(folder, **given, dtype=getattr(torch, dtype))
    seconds = time.perf_counter() - start
    ended.set()
    watcher.join()
    weights = sum(p.numel() * p.element_size() for m in (parts.llava, parts.tower) for p in m.parameters())
    above = max(peak[0], process.memory_info().rss) - before
    return {
        "weights_mb": round(weights / 2**20),
        "peak_mb": round(above / 2**20),
        "ratio": round(above / weights, 3),
        "seconds": round(seconds, 2),
    }


def time_inspect(root: Path) -> float:
    """Return the seconds that a new process takes to inspect a folder like LLaVA-1.5-7B's, without its bytes."""
    from originals import write_7b

    folder = write_7b(root / "7b")
    start = time.perf_counter()
    command = [sys.executable, "-c", INSPECT, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment())
    seconds = round(time.perf_counter() - start, 2)
    print(done.stdout, f"{seconds} s", flush=True)
    return seconds


def environment() -> dict[str, str]:
    """Return the settings of the measured processes: no network, no threads that would blur the peak."""
    paths = f"{ROOT}:{ROOT / 'tests'}"
    return os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "DS_ACCELERATOR": "cpu"}


if __name__ == "__main__":
    main()
