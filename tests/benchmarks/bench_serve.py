"""What Serve and HTTP cost: tokens a second of the bare engine, and of the service in front of it, in one run.

    python tests/benchmarks/bench_serve.py --output tests/benchmarks/results/serve.json

Each client asks one question after the other, without a pause, and reads its answer as a stream of 64 tokens. The bare
engine is measured before and after. Without ``--model`` it is that of bench_engine.py: all layers of the small one.
"""

import argparse
import asyncio
import json
import os
import statistics
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ.update(RAY_AUTH_MODE="disabled", RAY_USAGE_STATS_ENABLED="0", TOKENIZERS_PARALLELISM="false")

import aiohttp
import ray
from bench_engine import load_whole
from commands import free_port
from outcome import keep_result
from pictures import picture
from ray import serve
from serving import data_uri

from llava_ray.chat.conversation import Turn
from llava_ray.deployments import api
from llava_ray.deployments.engines import make_engine
from llava_ray.deployments.settings import ServeSettings
from llava_ray.generate.engine import GenerationRequest, Sampling
from llava_ray.model.saving import save_bundle

NUM_TOKENS = 64
TARGET = 0.15
COLOURS = ("red", "green", "blue", "yellow", "black", "white", "orange", "purple")

# Asks question number so-and-so, and returns the moments at which its tokens came.
Ask = Callable[[int], Awaitable[list[float]]]


async def measure(ask: Ask, num_clients: int, num_requests: int) -> dict[str, float]:
    """Let so many clients ask so many questions between them."""
    numbers = iter(range(num_requests))
    firsts: list[float] = []
    tokens = 0

    async def client() -> None:
        nonlocal tokens
        for number in numbers:
            start = time.perf_counter()
            moments = await ask(number)
            firsts.append(moments[0] - start)
            tokens += len(moments)

    start = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(num_clients)))
    seconds = time.perf_counter() - start
    return {
        "tokens_per_s": round(tokens / seconds, 1),
        "first_token_median_s": round(statistics.median(firsts), 3),
        "first_token_max_s": round(max(firsts), 3),
        "tokens": tokens,
    }


async def bare(settings: ServeSettings, rounds: list[tuple[int, int]]) -> dict[str, Any]:
    """Measure the engine alone, in this process."""
    [source] = settings.sources
    engine = make_engine(source, settings)
    await engine.start()
    images = [picture(112, 112, colour) for colour in COLOURS]
    sampling = Sampling(max_tokens=NUM_TOKENS, ignore_eos=True)

    async def ask(number: int) -> list[float]:
        turns = (Turn("human", f"<image>\nQuestion {number}: what is this?"),)
        request = GenerationRequest(f"r{number}", turns, images=(images[number % 8],), sampling=sampling)
        moments: list[float] = []
        async for chunk in engine.generate(request):
            moments += [time.perf_counter()] * len(chunk.token_ids)
        return moments

    await measure(ask, 4, 8)
    figures = {str(clients): await measure(ask, clients, requests) for clients, requests in rounds}
    await engine.stop()
    return figures


async def through_http(address: str, model: str, rounds: list[tuple[int, int]]) -> dict[str, Any]:
    """Measure what clients of the API see. They read lines: a client library's objects would cost what they measure."""
    images = [data_uri(picture(112, 112, colour)) for colour in COLOURS]
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(600)) as session:

        async def ask(number: int) -> list[float]:
            image = {"type": "image_url", "image_url": {"url": images[number % 8]}}
            text = {"type": "text", "text": f"Question {number}: what is this?"}
            body = {
                "model": model,
                "messages": [{"role": "user", "content": [image, text]}],
                "max_tokens": NUM_TOKENS,
                "temperature": 0,
                "stream": True,
                "stream_options": {"include_usage": True},
                "ignore_eos": True,
            }
            moments: list[float] = []
            usage = b""
            async with session.post(f"{address}/v1/chat/completions", json=body) as response:
                response.raise_for_status()
                async for line in response.content:
                    if b'"content":' in line:
                        moments.append(time.perf_counter())
                    if b'"completion_tokens":' in line:
                        usage = line
            # Events may hold several tokens, or none that can be read yet.
            num_tokens = json.loads(usage.removeprefix(b"data: "))["usage"]["completion_tokens"]
            return moments + [time.perf_counter()] * (num_tokens - len(moments))

        await measure(ask, 4, 8)
        return {str(clients): await measure(ask, clients, requests) for clients, requests in rounds}


def whole(weights: Path) -> str:
    """Return a bundle of the model that bench_engine.py measures."""
    bundle = weights / "bundle"
    if not bundle.exists():
        save_bundle(bundle, load_whole(weights))
    return str(bundle)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="any LLaVA")
    parser.add_argument("--weights", type=Path, default=Path("runs/cache/engine"), help="where models are kept")
    parser.add_argument("--engine", default="builtin")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--requests", type=int, default=2, help="a client")
    parser.add_argument("--output", type=Path)
    asked = parser.parse_args()
    values = {
        "model": asked.model or whole(asked.weights),
        "engine": asked.engine,
        "dtype": asked.dtype,
        "max_num_seqs": max(asked.clients),
    }
    values |= {"max_ingress_replicas": 1, "num_cpus": os.cpu_count() or 1, "max_queued_requests": 64}
    settings = ServeSettings.parsed(values)
    rounds = [(clients, clients * asked.requests) for clients in asked.clients]
    before = asyncio.run(bare(settings, rounds))
    port = free_port()
    ray.init(address="local", num_cpus=(os.cpu_count() or 1) + 1, include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(api(values), name="api", route_prefix="/")
    http = asyncio.run(through_http(f"http://127.0.0.1:{port}", settings.sources[0].name, rounds))
    serve.shutdown()
    ray.shutdown()
    after = asyncio.run(bare(settings, rounds))
    overhead = {
        clients: round(
            1 - 2 * http[clients]["tokens_per_s"] / (before[clients]["tokens_per_s"] + alone["tokens_per_s"]), 3
        )
        for clients, alone in after.items()
    }
    figures = {"cpus": os.cpu_count(), **values, "bare": before, "http": http, "bare_again": after}
    keep_result({**figures, "overhead": overhead, "target_overhead_32": TARGET}, asked.output)


if __name__ == "__main__":
    main()
