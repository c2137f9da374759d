#!/usr/bin/env python
"""The built-in engine beside transformers' own ``generate``, on real small weights in bf16.

Throughput at 1, 8 and 32 clients, time to first token under Poisson arrivals and of eight that come at once, the
longest pause of running streams, and how far bf16 answers agree.

python tests/benchmarks/bench_engine.py --output tests/benchmarks/results/engine.json
"""

import argparse
import asyncio
import io
import os
import platform
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import numpy as np
import torch
from outcome import keep_result
from PIL import Image

from llava_ray.chat.conversation import Turn
from llava_ray.generate.builtin.builtin_engine import BuiltinEngine
from llava_ray.generate.builtin.running_batch import RunningBatch
from llava_ray.generate.engine import GenerationRequest, Sampling
from llava_ray.generate.prompts import PromptMaker
from llava_ray.generate.vision_cache import VisionCache
from llava_ray.model.assembly import LlavaParts
from llava_ray.model.loading import load_pretrained_model
from llava_ray.quickstart.registry_weights import make_language_model, make_vision_tower

NUM_CORES = 2
IMAGE_SIZE = 112  # 64 image tokens
NEW_TOKENS = 64
CLIENTS = (1, 8, 32)
ROUNDS = 2  # requests of each client, one after the other
TARGETS = {"speedup_32": 13.0, "poisson_p99_over_lone": 4.0, "eight_over_eight_lone": 1.1, "pause_over_chunk": 1.1}


class TimedBatch(RunningBatch):
    """Keeps of each step how many tokens of prompts it read, and how long it took."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.steps: list[tuple[int, float]] = []

    def step(self) -> Any:
        before, start = self.num_prompt_tokens, time.perf_counter()
        told = super().step()
        self.steps.append((self.num_prompt_tokens - before, time.perf_counter() - start))
        return told


@dataclass
class Heard:
    """When the tokens of one answer came, in seconds after it was asked for."""

    ids: list[int]
    times: list[float]


def main() -> None:
    """Measure everything in one run, print and keep it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--weights", type=Path, default=Path("runs/cache/engine"), help="where models are kept")
    parser.add_argument("--num-alone", type=int, default=6, help="requests that generate answers, before and after")
    parser.add_argument("--num-poisson", type=int, default=100)
    parser.add_argument("--threads", type=int, default=NUM_CORES)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    parts = load_whole(options.weights)
    asked = [make_request(f"alone{index}", index) for index in range(options.num_alone)]
    before = time_generate(parts, asked)
    result = asyncio.run(measure(parts, asked, before.ids, options.num_poisson))
    after = time_generate(parts, asked)
    rates = [NEW_TOKENS * len(asked) / spent.seconds for spent in (before, after)]
    alone = statistics.mean(rates)
    for measured in result["throughput"].values():
        measured["over_generate"] = round(measured["tokens_per_second"] / alone, 2)
    keep_result(
        {
            "generate_tokens_per_second": [round(rate, 2) for rate in rates],
            **result,
            "speedup_32": result["throughput"]["32"]["over_generate"],
            "targets": TARGETS,
            "machine": f"{platform.machine()}, {options.threads} threads, Python {platform.python_version()}, "
            f"torch {torch.__version__}",
        },
        options.output,
    )


def load_whole(weights: Path) -> LlavaParts:
    """Load the small language model with all its layers and a tower of 64 image tokens; the projector is new."""
    language_model = make_language_model(weights, num_layers=30).path
    tower = make_vision_tower(weights, image_size=IMAGE_SIZE).path
    return load_pretrained_model(language_model, vision_tower=tower, version="chat_template", dtype=torch.bfloat16)


@dataclass(frozen=True)
class Spent:
    """What generate wrote, and in what time."""

    ids: list[list[int]]
    seconds: float


@torch.inference_mode()
def time_generate(parts: LlavaParts, asked: Sequence[GenerationRequest]) -> Spent:
    """Answer requests one at a time with transformers: decode and see the image, read the prompt, write."""
    maker = PromptMaker(parts, VisionCache(0), 8192)

    def answer(request: GenerationRequest) -> list[int]:
        prompt = maker.make(request)
        views = [image.views for image in prompt.images if image.views is not None]
        ids = torch.tensor([prompt.ids])
        written = parts.llava.language_model.generate(
            inputs_embeds=parts.llava.embed(ids, parts.tower.extract(torch.cat(views))),
            attention_mask=torch.ones_like(ids),
            min_new_tokens=NEW_TOKENS,
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=parts.tokenizer.vocab_size + 10**6,  # never written, and so never suppressed
            pad_token_id=0,
        )
        answered: list[int] = written[0].tolist()
        return answered

    answer(asked[0])
    start = time.perf_counter()
    ids = [answer(request) for request in asked]
    return Spent(ids, time.perf_counter() - start)


async def measure(
    parts: LlavaParts, asked: Sequence[GenerationRequest], alone: Sequence[list[int]], num_poisson: int
) -> dict[str, Any]:
    """Return all that the engine is measured by."""
    made: list[TimedBatch] = []

    def make_batch(*arguments: Any) -> TimedBatch:
        made.append(TimedBatch(*arguments))
        return made[0]

    engine = BuiltinEngine(lambda: parts, make_batch=make_batch)
    await engine.start()
    batch, numbers = made[0], Numbers()
    await hear(engine, numbers.request())
    answers = [heard.ids for heard in await asyncio.gather(*(hear(engine, request) for request in asked))]
    throughput = {str(clients): await run_clients(engine, numbers, clients) for clients in CLIENTS}
    lone = [await hear(engine, numbers.request(max_tokens=1)) for _ in range(8)]
    first = statistics.median(heard.times[0] for heard in lone)
    eight = [await come_together(engine, numbers) for _ in range(3)]
    capacity = throughput["32"]["tokens_per_second"] / NEW_TOKENS
    waits = await arrive(engine, numbers, num_poisson, capacity / 2)
    pause = await find_pause(engine, batch, numbers)
    await engine.stop()
    p99 = float(np.percentile(waits, 99))
    return {
        "throughput": throughput,
        "bf16_agreement": agreement(answers, alone),
        "lone_first_token_seconds": round(first, 4),
        "eight_last_first_token_seconds": round(statistics.median(eight), 4),
        "eight_over_eight_lone": round(statistics.median(eight) / (8 * first), 3),
        "poisson": {
            "requests_per_second": round(capacity / 2, 3),
            "num_requests": num_poisson,
            "p50_first_token_seconds": round(float(np.percentile(waits, 50)), 4),
            "p99_first_token_seconds": round(p99, 4),
        },
        "poisson_p99_over_lone": round(p99 / first, 2),
        **pause,
    }


class Numbers:
    """Requests that have not been made before, each about an image of its own."""

    def __init__(self) -> None:
        self.next = 10_000

    def request(self, max_tokens: int = NEW_TOKENS) -> GenerationRequest:
        self.next += 1
        return make_request(str(self.next), self.next, max_tokens)


def make_request(name: str, number: int, max_tokens: int = NEW_TOKENS) -> GenerationRequest:
    """Ask about a random image; each request has other ones, so that nothing is known before."""
    coarse = np.random.default_rng(number).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(coarse).resize((224, 168)).save(buffer, "JPEG")
    turns = (Turn("human", f"<image>\nWhat is shown in picture {number}?"),)
    sampling = Sampling(max_tokens=max_tokens, ignore_eos=True)
    return GenerationRequest(name, turns, images=(buffer.getvalue(),), sampling=sampling)


async def hear(engine: BuiltinEngine, request: GenerationRequest) -> Heard:
    start, heard = time.perf_counter(), Heard([], [])
    async for chunk in engine.generate(request):
        heard.times += [time.perf_counter() - start] * len(chunk.token_ids)
        heard.ids += chunk.token_ids
    return heard


async def run_clients(engine: BuiltinEngine, numbers: Numbers, count: int) -> dict[str, float]:
    """Let clients ask one request after another; return the rate of new tokens of all together."""

    async def client() -> None:
        for _ in range(ROUNDS):
            await hear(engine, numbers.request())

    start = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(count)))
    seconds = time.perf_counter() - start
    return {"tokens_per_second": round(count * ROUNDS * NEW_TOKENS / seconds, 2)}


async def come_together(engine: BuiltinEngine, numbers: Numbers) -> float:
    """Return when the last of eight requests that came at once had its first token."""
    heard = await asyncio.gather(*(hear(engine, numbers.request(max_tokens=8)) for _ in range(8)))
    return max(one.times[0] for one in heard)


async def arrive(engine: BuiltinEngine, numbers: Numbers, count: int, rate: float) -> list[float]:
    """Return the times to first token of requests that arrive at random, so many a second."""
    draw, tasks = random.Random(0), []
    for _ in range(count):
        tasks.append(asyncio.create_task(hear(engine, numbers.request())))
        await asyncio.sleep(draw.expovariate(rate))
    return [heard.times[0] for heard in await asyncio.gather(*tasks)]


async def find_pause(engine: BuiltinEngine, batch: TimedBatch, numbers: Numbers) -> dict[str, Any]:
    """Let twelve requests join eight running streams; return the streams' longest pause, and the longest chunk."""
    streams = [asyncio.create_task(hear(engine, numbers.request())) for _ in range(8)]
    while engine.stats().num_running < 8 or any(running.num_unread for running in batch.running):
        await asyncio.sleep(0.01)
    batch.steps.clear()
    late = [asyncio.create_task(hear(engine, numbers.request())) for _ in range(12)]
    heard = await asyncio.gather(*streams)
    steps = list(batch.steps)
    await asyncio.gather(*late)
    pauses = [after - before for one in heard for before, after in zip(one.times[1:], one.times[2:], strict=False)]
    longest_step = max(seconds for num_tokens, seconds in steps if num_tokens)
    return {
        "longest_pause_seconds": round(max(pauses), 4),
        "longest_chunk_seconds": round(longest_step, 4),
        "pause_over_chunk": round(max(pauses) / longest_step, 3),
        "most_prompt_tokens_a_step": max(num_tokens for num_tokens, _ in steps),
        "prefill_chunk": batch.chunk,
    }


def agreement(answers: Sequence[list[int]], alone: Sequence[list[int]]) -> dict[str, Any]:
    """Return how many answers are those of generate, and after how many tokens the others leave them."""
    shared = [
        next((place for place, pair in enumerate(zip(mine, theirs, strict=True)) if pair[0] != pair[1]), NEW_TOKENS)
        for mine, theirs in zip(answers, alone, strict=True)
    ]
    return {"same_answers": shared.count(NEW_TOKENS), "of": len(shared), "tokens_before_first_difference": shared}


if __name__ == "__main__":
    main()
