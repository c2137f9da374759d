#!/usr/bin/env python
"""What LoRA adapters beside a base cost the built-in engine, on real small weights in bf16 with 32 clients.

The rate of new tokens with requests of four adapters in one batch, beside that of the base alone in the same engine and
of an engine without adapters; and beside that of the merged models, asked one after the other with eight clients each.

python tests/benchmarks/bench_adapters.py --output tests/benchmarks/results/adapters.json
"""

import argparse
import asyncio
import platform
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from bench_engine import NEW_TOKENS, NUM_CORES, Numbers, hear, load_whole
from outcome import keep_result

from llava_ray.config.lora import LoraConfig
from llava_ray.generate.builtin.builtin_engine import BuiltinEngine
from llava_ray.model.lora.adapters import add_adapter
from llava_ray.model.saving import save_bundle

CLIENTS, NUM_ADAPTERS, RANK = 32, 4, 16
TARGETS = {"mixed_over_base": 0.8, "idle_over_without": 0.97}


def write_adapter(weights: Path, folder: Path, seed: int) -> Path:
    """Write an adapter over every matrix of the language model, as after training."""
    parts = load_whole(weights)
    add_adapter(parts.llava.language_model, LoraConfig(lora_enable=True, lora_r=RANK), seed=seed)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in parts.llava.language_model.parameters():
            if parameter.requires_grad:
                parameter += 0.005 * torch.randn_like(parameter)  # more, and bf16 would refuse it
    save_bundle(folder, parts)
    return folder


async def rate(engine: BuiltinEngine, numbers: Numbers, names: Sequence[str | None], count: int) -> float:
    """Return the new tokens a second of so many clients, each of the next name, that ask two requests each."""

    async def client(name: str | None) -> None:
        for _ in range(2):
            await hear(engine, replace(numbers.request(), model=name))

    start = time.perf_counter()
    await asyncio.gather(*(client(names[index % len(names)]) for index in range(count)))
    return count * 2 * NEW_TOKENS / (time.perf_counter() - start)


async def measure(weights: Path, folders: dict[str, Path]) -> dict[str, list[float]]:
    """Return the rates, each twice, the second time in the opposite order: the machine is not always as fast."""
    rates: dict[str, list[float]] = {"without": [], "idle": [], "one": [], "mixed": []}
    numbers = Numbers()
    plain = BuiltinEngine(lambda: load_whole(weights))
    adapted = BuiltinEngine(lambda: load_whole(weights), adapters=folders)
    for engine in (plain, adapted):
        await engine.start()
        await hear(engine, numbers.request())
    first, *_ = folders
    cases = [("without", plain, [None]), ("idle", adapted, [None]), ("one", adapted, [first])]
    cases.append(("mixed", adapted, [*folders]))
    for order in (cases, cases[::-1]):
        for name, engine, names in order:
            rates[name].append(round(await rate(engine, numbers, names, CLIENTS), 1))
    few = [await rate(plain, numbers, [None], CLIENTS // NUM_ADAPTERS) for _ in range(2)]
    rates["one_model_after_the_other"] = [round(value, 1) for value in few]  # merged, a model is as fast as its base
    for engine in (plain, adapted):
        await engine.stop()
    return rates


def main() -> None:
    """Measure in one run, print and keep it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--weights", type=Path, default=Path("runs/cache/engine"), help="where models are kept")
    parser.add_argument("--threads", type=int, default=NUM_CORES)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with TemporaryDirectory() as folder:
        names = [f"adapter{seed}" for seed in range(NUM_ADAPTERS)]
        folders = {name: write_adapter(options.weights, Path(folder) / name, seed) for seed, name in enumerate(names)}
        rates = asyncio.run(measure(options.weights, folders))
    total = {name: sum(values) for name, values in rates.items()}
    keep_result(
        {
            "tokens_per_second": rates,
            "idle_over_without": round(total["idle"] / total["without"], 3),
            "one_over_base": round(total["one"] / total["idle"], 3),
            "mixed_over_base": round(total["mixed"] / total["idle"], 3),
            "mixed_over_one_model_after_the_other": round(total["mixed"] / total["one_model_after_the_other"], 2),
            "targets": TARGETS,
            "machine": f"{platform.machine()}, {options.threads} threads, Python {platform.python_version()}, "
            f"torch {torch.__version__}",
        },
        options.output,
    )


if __name__ == "__main__":
    main()
