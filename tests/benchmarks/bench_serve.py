"""What Serve and HTTP cost: tokens a second of the bare engine, and of the service in front of it, in one run.

    python tests/benchmarks/bench_serve.py --output tests/benchmarks/results/serve.json

Each client asks one question after the other, without a pause, and reads its answer as a stream of 64 tokens. The bare
engine and the service take turns; the service is started and stopped each time, so that the bare engine has the machine
to itself. Medians are compared. Without ``--model`` it is that of bench_serve_peers.py, a small one with all its
layers. Other ways to the ingress than Serve's proxy are measured by Ray's own variables: RAY_SERVE_PROXY_USE_GRPC=1 has
the proxy call it over gRPC, RAY_SERVE_ENABLE_DIRECT_INGRESS=1 does without a proxy.
"""

import argparse
import asyncio
import itertools
import json
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ.update(RAY_AUTH_MODE="disabled", RAY_USAGE_STATS_ENABLED="0", TOKENIZERS_PARALLELISM="false")
os.environ.update(RAY_worker_niceness="0")  # as that of the bare engine

import aiohttp
import psutil
import ray
from bench_serve_peers import make_model
from commands import free_port
from outcome import describe_processor, keep_result
from pictures import picture
from ray import serve
from ray.serve._private import constants
from serving import data_uri

from llava_ray.chat.conversation import Turn
from llava_ray.deployments import api
from llava_ray.deployments.engines import make_engine
from llava_ray.deployments.settings import ServeSettings
from llava_ray.generate.engine import Engine, GenerationRequest, Sampling

NUM_TOKENS = 64
TARGET = 0.1
COLOURS = ("red", "green", "blue", "yellow", "black", "white", "orange", "purple")

# Asks question number so-and-so, and returns the moments at which its tokens came.
Ask = Callable[[int], Awaitable[list[float]]]


async def measure(ask: Ask, num_clients: int, numbers: range) -> dict[str, float]:
    """Let so many clients ask these questions between them."""
    left = iter(numbers)
    firsts: list[float] = []
    tokens = 0

    async def client() -> None:
        nonlocal tokens
        for number in left:
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
    }


def ask_engine(engine: Engine) -> Ask:
    """Return how the bare engine is asked."""
    images = [picture(112, 112, colour) for colour in COLOURS]
    sampling = Sampling(max_tokens=NUM_TOKENS, ignore_eos=True)

    async def ask(number: int) -> list[float]:
        turns = (Turn("human", f"<image>\nQuestion {number}: what is this?"),)
        request = GenerationRequest(f"r{number}", turns, images=(images[number % 8],), sampling=sampling)
        moments: list[float] = []
        async for chunk in engine.generate(request):
            moments += [time.perf_counter()] * len(chunk.token_ids)
        return moments

    return ask


def ask_service(session: aiohttp.ClientSession, address: str, model: str) -> Ask:
    """Return how the API is asked. Its lines are read: a client library's objects would cost what they measure."""
    images = [data_uri(picture(112, 112, colour)) for colour in COLOURS]

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
        num_tokens: int = json.loads(usage.removeprefix(b"data: "))["usage"]["completion_tokens"]
        assert num_tokens == NUM_TOKENS
        # Events may hold several tokens, or none that can be read yet.
        return moments[:1] + [time.perf_counter()] * (NUM_TOKENS - 1)

    return ask


class Bench:
    """One bare engine, and one service after another, asked the same questions."""

    def __init__(self, values: dict[str, Any], clients: list[int], num_requests: int) -> None:
        self.values = values
        self.settings = ServeSettings.parsed(values)
        self.clients = clients
        self.num_requests = num_requests
        self.engine = make_engine(self.settings.sources[0], self.settings)

    async def start(self) -> None:
        await self.engine.start()
        await measure(ask_engine(self.engine), 4, range(8))

    async def alone(self, first: int) -> dict[str, Any]:
        """Measure the engine alone, in this process."""
        return await self.rounds(ask_engine(self.engine), first)

    async def served(self, address: str, first: int) -> dict[str, Any]:
        """Measure what clients of the API see, and the processors' time of Serve's processes."""
        limits = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(600), connector=limits) as session:
            ask = ask_service(session, address, self.settings.sources[0].name)
            await measure(ask, 4, range(8))
            return await self.rounds(ask, first)

    async def rounds(self, ask: Ask, first: int) -> dict[str, Any]:
        """Measure each number of clients, with new questions: the engine remembers the last ones."""
        figures: dict[str, Any] = {}
        for clients in self.clients:
            before, last = processor_seconds(), first + clients * self.num_requests
            figures[str(clients)] = await measure(ask, clients, range(first, last))
            spent, first = processor_seconds() - before, last
            num_tokens = clients * self.num_requests * NUM_TOKENS
            figures[str(clients)]["serve_cpu_us_per_token"] = {
                name: round(1e6 * seconds / num_tokens) for name, seconds in sorted(spent.items())
            }
        return figures


def processor_seconds() -> Counter[str]:
    """Return the processors' time of this cluster's processes but the models', which also compute."""
    found: Counter[str] = Counter()
    for process in psutil.Process().children(recursive=True):
        try:
            name = process.cmdline()[0].rpartition("/")[2].partition(" ")[0]
            times = process.cpu_times()
        except (psutil.Error, IndexError):
            continue
        if name in ("raylet", "gcs_server") or (name.startswith("ray::Serve") and ":model-" not in name):
            found[name.removeprefix("ray::")] += times.user + times.system
        elif name.startswith("ray::Proxy"):
            found["ProxyActor"] += times.user + times.system
    return found


def start_service(values: dict[str, Any]) -> str:
    """Start Ray, Serve and the API; return its address."""
    port = free_port()
    ray.init(address="local", num_cpus=(os.cpu_count() or 1) + 1, include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(api(values), name="api", route_prefix="/")
    if constants.RAY_SERVE_ENABLE_DIRECT_INGRESS:
        port = constants.RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT
    return f"http://127.0.0.1:{port}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="any LLaVA")
    parser.add_argument("--weights", type=Path, default=Path("runs/cache/engine"), help="where models are kept")
    parser.add_argument("--engine", default="builtin")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--requests", type=int, default=2, help="a client")
    parser.add_argument("--repeats", type=int, default=3, help="turns of the bare engine and the service")
    parser.add_argument("--output", type=Path)
    asked = parser.parse_args()
    values = {
        "model": asked.model or str(make_model(asked.weights)),
        "engine": asked.engine,
        "dtype": asked.dtype,
        "max_num_seqs": max(asked.clients),
        "engine.kv_cache_bytes": 2**30,
    }
    values |= {"max_ingress_replicas": 1, "num_cpus": os.cpu_count() or 1, "max_queued_requests": 64}
    bench = Bench(values, asked.clients, asked.requests)
    turns: list[dict[str, Any]] = []
    with asyncio.Runner() as runner:
        runner.run(bench.start())
        for first in itertools.islice(itertools.count(1000, 1000), asked.repeats):
            alone = runner.run(bench.alone(first))
            address = start_service(values)
            served = runner.run(bench.served(address, first))
            serve.shutdown()
            ray.shutdown()
            turns.append({"bare": alone, "http": served})
            print(json.dumps(turns[-1]), flush=True)
        runner.run(bench.engine.stop())
    medians = {
        way: {
            clients: statistics.median(turn[way][clients]["tokens_per_s"] for turn in turns)
            for clients in map(str, asked.clients)
        }
        for way in ("bare", "http")
    }
    overhead = {clients: round(1 - medians["http"][clients] / rate, 3) for clients, rate in medians["bare"].items()}
    ways = ("RAY_SERVE_PROXY_USE_GRPC", "RAY_SERVE_ENABLE_DIRECT_INGRESS")
    variables = {name: os.environ[name] for name in ways if name in os.environ}
    figures = {
        "processor": describe_processor(),
        "command": " ".join(sys.argv),
        **variables,
        **values,
        "turns": turns,
        "tokens_per_s": medians,
    }
    keep_result({**figures, "overhead": overhead, "target_overhead_32": TARGET}, asked.output)


if __name__ == "__main__":
    main()
