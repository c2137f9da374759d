#!/usr/bin/env python
"""The built-in engine beside vLLM's CPU build: the same model, prompts and images, at 1, 8 and 32 clients.

Each engine runs in a process and an environment of its own, ours and vLLM's in turns; ``generate`` of transformers
answers the same questions one at a time. vLLM's environment is that of ``make test-vllm``; without it only ours runs.

    python tests/benchmarks/bench_serve_peers.py --output tests/benchmarks/results/serve_peers.json
"""

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import fakes
import torch
from bench_engine import NEW_TOKENS, Heard, Numbers, make_request, time_generate
from outcome import describe_processor, keep_result

from llava_ray.generate.builtin.builtin_engine import BuiltinEngine
from llava_ray.generate.engine import Engine, GenerationRequest
from llava_ray.generate.settings import EngineSettings, VllmSettings
from llava_ray.generate.vllm.vllm_engine import VllmEngine
from llava_ray.model.loading import load_pretrained_model
from llava_ray.model.saving import save_bundle
from llava_ray.quickstart.registry_weights import make_language_model

ROOT = Path(__file__).parents[2]
CLIENTS = (1, 8, 32)
KV_GIB = 2
MAX_MODEL_LEN = 2048
TARGETS = {"over_vllm_1": 1.0, "over_vllm_8": 1.0, "over_vllm_32": 0.9, "over_generate_32": 13.0}
_RESULT = "RESULT "
_TIMEOUT_S = 3600


def main() -> None:
    """Run every engine, and print and keep how they compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--weights", type=Path, default=Path("runs/cache/engine"), help="where models are kept")
    parser.add_argument("--vllm", type=Path, default=ROOT / ".venv-vllm/bin/python", help="vLLM's Python")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--rounds", type=int, default=2, help="requests of each client, one after the other")
    parser.add_argument("--engine", choices=("builtin", "vllm", "generate"), help="measure one, in this process")
    parser.add_argument("--model", type=Path, help="a model made before")
    options = parser.parse_args()
    model = (options.model or make_model(options.weights)).resolve()
    if options.engine:
        torch.set_num_threads(options.threads)
        measured = measure_generate(model) if options.engine == "generate" else measure_engine(options, model)
        print(_RESULT + json.dumps(measured), flush=True)
        return
    has_vllm = options.vllm.exists()
    order = ["generate", "builtin", *(["vllm", "builtin", "vllm"] if has_vllm else [])]
    runs = [(name, measure_elsewhere(name, model, options)) for name in order]
    keep_result(compare(runs, options.threads), options.output)


def make_model(weights: Path) -> Path:
    """Make the small language model with all its layers behind a SigLIP of 64 image tokens, which vLLM takes too."""
    folder = weights / "siglip-135m"
    if not folder.exists():
        language_model = make_language_model(weights, num_layers=30).path
        tower = fakes.make_vision_tower(
            weights / "siglip-tower", "siglip", hidden_size=384, image_size=112, patch_size=14
        )
        parts = load_pretrained_model(language_model, vision_tower=tower, version="chat_template", dtype=torch.bfloat16)
        save_bundle(folder, parts, include="all")
    return folder


def measure_elsewhere(name: str, model: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Measure an engine in its own process and environment."""
    python = options.vllm if name == "vllm" else sys.executable
    threads, rounds = str(options.threads), str(options.rounds)
    command = [str(python), __file__, "--engine", name, "--model", str(model), "--threads", threads, "--rounds", rounds]
    environment = os.environ | {
        "OMP_NUM_THREADS": threads,
        "PYTHONPATH": str(ROOT),
        "VLLM_CPU_KVCACHE_SPACE": str(KV_GIB),
        "VLLM_LOGGING_LEVEL": "WARNING",
    }
    ended = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False, timeout=_TIMEOUT_S)
    lines = [line for line in ended.stdout.splitlines() if line.startswith(_RESULT)]
    if ended.returncode or not lines:
        raise SystemExit(f"{name} ended with {ended.returncode}:\n{ended.stdout[-3000:]}")
    measured: dict[str, Any] = json.loads(lines[-1].removeprefix(_RESULT))
    print(name, measured, flush=True)
    return measured


def measure_generate(model: Path) -> dict[str, Any]:
    """Answer questions one at a time with transformers."""
    parts = load_pretrained_model(model, dtype=torch.bfloat16)
    asked = [make_request(f"alone{index}", index) for index in range(4)]
    return {"tokens_per_second": round(NEW_TOKENS * len(asked) / time_generate(parts, asked).seconds, 2)}


def measure_engine(options: argparse.Namespace, model: Path) -> dict[str, Any]:
    """Measure one engine in this process."""
    if options.engine == "vllm":
        settings = VllmSettings(
            max_running=max(CLIENTS), max_model_len=MAX_MODEL_LEN, dtype="bfloat16", kv_cache_bytes=KV_GIB * 2**30
        )
        engine: Engine = VllmEngine(model, settings=settings)
    else:
        bounds = EngineSettings(max_running=max(CLIENTS), max_model_len=MAX_MODEL_LEN, kv_cache_bytes=KV_GIB * 2**30)
        engine = BuiltinEngine(lambda: load_pretrained_model(model, dtype=torch.bfloat16), settings=bounds)
    return asyncio.run(run_engine(engine, options.rounds))


async def run_engine(engine: Engine, rounds: int) -> dict[str, Any]:
    """Return the rates and first tokens at each number of clients."""
    await engine.start()
    numbers = Numbers()
    for _ in range(2):
        await hear(engine, numbers.request())
    measured = {str(count): await run_clients(engine, numbers, count, rounds) for count in CLIENTS}
    await engine.stop()
    return measured


async def run_clients(engine: Engine, numbers: Numbers, count: int, rounds: int) -> dict[str, float]:
    """Let clients ask one request after another; return the rate of all together, and the median first token."""
    firsts: list[float] = []

    async def client() -> None:
        for _ in range(rounds if count > 1 else 2 * rounds):
            heard = await hear(engine, numbers.request())
            assert len(heard.ids) == NEW_TOKENS
            firsts.append(heard.times[0])

    start = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(count)))
    seconds = time.perf_counter() - start
    return {
        "tokens_per_second": round(len(firsts) * NEW_TOKENS / seconds, 2),
        "first_token_seconds": round(statistics.median(firsts), 3),
    }


async def hear(engine: Engine, request: GenerationRequest) -> Heard:
    """Ask one question."""
    start, heard = time.perf_counter(), Heard([], [])
    async for chunk in engine.generate(request):
        heard.times += [time.perf_counter() - start] * len(chunk.token_ids)
        heard.ids += chunk.token_ids
    return heard


def compare(runs: list[tuple[str, dict[str, Any]]], threads: int) -> dict[str, Any]:
    """Return all measurements, and our rates (the means of all runs) over the others'."""
    engines = {name: [measured for other, measured in runs if other == name] for name in ("builtin", "vllm")}
    [alone] = [measured for name, measured in runs if name == "generate"]
    ours = mean_rates(engines["builtin"])
    over = {f"over_generate_{count}": round(rate / alone["tokens_per_second"], 2) for count, rate in ours.items()}
    if engines["vllm"]:
        theirs = mean_rates(engines["vllm"])
        over |= {f"over_vllm_{count}": round(rate / theirs[count], 3) for count, rate in ours.items()}
    return {
        **engines,
        "generate": alone,
        **over,
        "targets": TARGETS,
        "new_tokens": NEW_TOKENS,
        "threads": threads,
        "processor": describe_processor(),
        "command": " ".join(sys.argv),
        "load": round(os.getloadavg()[0], 1),
    }


def mean_rates(runs: list[dict[str, Any]]) -> dict[int, float]:
    """Return the mean tokens a second of an engine's runs, by clients."""
    return {count: statistics.mean(one[str(count)]["tokens_per_second"] for one in runs) for count in CLIENTS if runs}


if __name__ == "__main__":
    main()
