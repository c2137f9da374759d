"""Two thousand idle streams against the page on Ray Serve: health and chats of others are answered as before."""

import asyncio
import json
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from commands import free_port
from serving import asking

pytestmark = [pytest.mark.verify, pytest.mark.ray, pytest.mark.timeout(600)]

RESULTS = Path(__file__).parents[3] / "tests" / "benchmarks" / "results"
NUM_STREAMS, NUM_ADDRESSES, MOST_LATER_S = 2000, 8, 2.0


@pytest.fixture
def port(ray_cluster: None) -> Iterator[int]:
    from ray import serve

    from llava_ray.deployments import app

    number = free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": number})
    serve.run(app({"model": "echo@echo", "engine": "serving:make_engine", "num_cpus": "0.1"}), route_prefix="/")
    yield number
    serve.shutdown()


async def open_stream(port: int, number: int, statuses: Counter[str]) -> asyncio.StreamWriter:
    """Ask for a heartbeat from one of the addresses, and keep it."""
    reader, writer = await asyncio.open_connection(
        "127.0.0.1", port, local_addr=(f"127.0.0.{2 + number % NUM_ADDRESSES}", 0)
    )
    writer.write(f"GET /gradio_api/heartbeat/s{number} HTTP/1.1\r\nhost: x\r\n\r\n".encode())
    line = await reader.readline()
    statuses[line.decode().split()[1]] += 1
    return writer


def timed(act: Callable[[], httpx.Response], times: int) -> list[float]:
    seconds = []
    for _ in range(times):
        start = time.monotonic()
        assert act().status_code == 200
        seconds.append(time.monotonic() - start)
    return seconds


def measure(port: int, times: int) -> tuple[list[float], list[float]]:
    """Seconds of /health and of a chat, each time on a new connection from 127.0.0.1."""
    address = f"http://127.0.0.1:{port}"
    health = timed(lambda: httpx.get(f"{address}/health", timeout=60), times)
    chat = timed(lambda: httpx.post(f"{address}/v1/chat/completions", json=asking("one two"), timeout=60), times)
    return health, chat


def test_two_thousand_idle_heartbeats(port: int) -> None:
    statuses = Counter[str]()

    async def run() -> list[tuple[list[float], list[float]]]:
        measure(port, 3)
        found = [await asyncio.to_thread(measure, port, 10)]
        streams = []
        for first in range(0, NUM_STREAMS, 100):
            wave = (open_stream(port, number, statuses) for number in range(first, first + 100))
            streams += await asyncio.gather(*wave)
            found.append(await asyncio.to_thread(measure, port, 1))
        found.append(await asyncio.to_thread(measure, port, 10))
        for stream in streams:
            stream.close()
        return found

    unloaded, *during = asyncio.run(run())
    medians = [statistics.median(times) for times in unloaded]
    slowest = [max(max(one[kind]) for one in during) for kind in range(2)]
    figures = {
        "streams": NUM_STREAMS,
        "addresses": NUM_ADDRESSES,
        "accepted": statuses["200"],
        "refused": statuses["429"],
        "health_unloaded_s": round(medians[0], 4),
        "health_slowest_s": round(slowest[0], 4),
        "chat_unloaded_s": round(medians[1], 4),
        "chat_slowest_s": round(slowest[1], 4),
    }
    (RESULTS / "page_flood.json").write_text(json.dumps(figures, indent=1) + "\n")
    print(figures)
    assert sum(statuses.values()) == statuses["200"] + statuses["429"] == NUM_STREAMS
    assert statuses["200"] <= 512
    assert all(found < alone + MOST_LATER_S for found, alone in zip(slowest, medians, strict=True))
