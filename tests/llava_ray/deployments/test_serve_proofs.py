"""Long proofs of the service: crowds, killed and stopped replicas, a ramp. Figures go to tests/benchmarks/results."""

import asyncio
import contextlib
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
import ray
from commands import free_port
from pictures import noise
from serve_load import Ends, crowd, memory_of, serve_pids
from serving import asking, data_uri

from llava_ray.deployments.applications import INGRESS_CPUS

pytestmark = [pytest.mark.verify, pytest.mark.ray, pytest.mark.timeout(900)]

RESULTS = Path(__file__).parents[3] / "tests" / "benchmarks" / "results"
FRONT = "ray::ServeReplica:api:api"
FAKE = {"engine": "serving:make_engine", "num_cpus": "0.1", "max_ingress_replicas": "1"}


@contextlib.contextmanager
def service(**settings: str) -> Iterator[str]:
    from ray import serve

    from llava_ray.deployments import api

    port = free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    try:
        serve.run(api(FAKE | settings), name="api", route_prefix="/")
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()


def record(name: str, figures: dict[str, Any]) -> None:
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"serve_{name}.json").write_text(json.dumps(figures, indent=1) + "\n")
    print(name, json.dumps(figures))


def replicas(address: str) -> set[str]:
    """The replicas of the model that answer."""
    text = httpx.get(f"{address}/metrics", timeout=10).text
    lines = [line for line in text.splitlines() if line.startswith("vllm:num_requests_running{")]
    return {line.partition('engine="')[2].partition('"')[0] for line in lines}


def pids(address: str, count: int) -> list[int]:
    """The processes of the model's replicas, as they say themselves."""
    client, found = openai.OpenAI(base_url=f"{address}/v1", api_key="none", timeout=30), set[int]()
    for index in range(100):
        found.add(int(client.chat.completions.create(**asking(f"PID {index}")).choices[0].message.content.split()[0]))
        if len(found) == count:
            break
    assert len(found) == count
    return sorted(found)


def test_two_hundred_clients_for_a_minute(ray_cluster: None) -> None:
    """One replica that writes 32 answers at a time, 64 waiting."""
    model = "echo@echo?token_s=0.2"
    with service(model=model, max_num_seqs="32", max_queued_requests="64") as address:
        asyncio.run(crowd(address, 50, 5, 20, Ends()))  # everything is imported and grown
        before = memory_of(serve_pids())
        ends = asyncio.run(crowd(address, 200, 60, 20, Ends()))
        after = memory_of(serve_pids())
        alone = asyncio.run(crowd(address, 1, 1, 5, Ends()))
        record(
            "crowd",
            {"clients": 200, "seconds": 60, **ends.counts, "mib_before": round(before), "mib_after": round(after)},
        )
    assert ends.wrong == []
    assert set(ends.counts) == {"answered", "refused"}
    assert after - before < 100
    assert set(alone.counts) == {"answered"}


def lost_replica(stop: signal.Signals, seconds: float) -> dict[str, Any]:
    """Take one of two replicas away under load; return how it went.

    They and the ingress take all CPUs: another replica has room when what the first held has been given back.
    """
    settings = {"model": "echo@echo?token_s=0.2", "min_replicas": "2", "max_replicas": "2", "max_num_seqs": "8"}
    num_cpus = (ray.cluster_resources()["CPU"] - INGRESS_CPUS) / 2
    with service(**settings, max_queued_requests="32", num_cpus=str(num_cpus)) as address:
        victim, survivor = pids(address, 2)
        assert ray.available_resources().get("CPU", 0.0) < num_cpus
        ends = Ends()

        async def run() -> tuple[float, float]:
            first = replicas(address)
            load = asyncio.create_task(crowd(address, 24, seconds, 20, ends))
            await asyncio.sleep(3)
            os.kill(victim, stop)
            killed = time.monotonic()
            while True:
                await asyncio.sleep(0.5)
                with contextlib.suppress(httpx.HTTPError):
                    engines = await asyncio.to_thread(replicas, address)
                    if len(engines) == 2 and engines - first:
                        break
                assert time.monotonic() - killed < seconds
            back = time.monotonic() - killed
            await load
            return killed, back

        killed, back = asyncio.run(run())
        again = asyncio.run(crowd(address, 8, 2, 5, Ends()))
        assert set(again.counts) == {"answered"}
        assert survivor in pids(address, 2)
        assert not psutil.pid_exists(victim)
    assert ends.wrong == []
    assert set(ends.counts) <= {"answered", "refused", "lost"}
    lost = [moment - killed for moment, how in ends.moments if how == "lost"]
    return {**ends.counts, "back_after_s": round(back, 1), "last_lost_after_s": round(max(lost, default=0.0), 1)}


def test_a_killed_replica_under_load(ray_cluster: None) -> None:
    figures = lost_replica(signal.SIGKILL, 60)
    record("sigkill", figures)
    assert figures["back_after_s"] < 45
    assert 1 <= figures["lost"] <= 8


def test_a_stopped_replica_is_replaced(ray_cluster: None) -> None:
    figures = lost_replica(signal.SIGSTOP, 100)
    record("sigstop", figures)
    assert figures["back_after_s"] < 75
    assert figures["last_lost_after_s"] < 25
    assert 1 <= figures["lost"] <= 8


def test_a_stopped_front_is_replaced(ray_cluster: None) -> None:
    """The only ingress; nobody else could tell its clients anything."""
    num_cpus = ray.cluster_resources()["CPU"] - INGRESS_CPUS
    with service(model="echo@echo", num_cpus=str(num_cpus)) as address:
        (front,) = (pid for pid in serve_pids() if psutil.Process(pid).cmdline()[0].startswith(FRONT))
        os.kill(front, signal.SIGSTOP)
        stopped = time.monotonic()
        while psutil.pid_exists(front) or not answers(address):
            assert time.monotonic() - stopped < 75
            time.sleep(0.5)
        record("sigstop_front", {"back_after_s": round(time.monotonic() - stopped, 1)})
        assert set(asyncio.run(crowd(address, 8, 2, 5, Ends())).counts) == {"answered"}


def answers(address: str) -> bool:
    with contextlib.suppress(httpx.HTTPError):
        return httpx.get(f"{address}/health", timeout=2).status_code == 200
    return False


def test_a_body_of_128_mib_where_settings_allow_it(ray_cluster: None) -> None:
    mib = 2**20
    settings = {"max_body_bytes": str(128 * mib), "max_image_bytes": str(96 * mib), "max_image_pixels": "50000000"}
    with service(model="echo@echo", **settings) as address:
        for images in ([noise(95 * mib)], [noise(23 * mib)] * 4):
            asked = asking("what is this?", *map(data_uri, images))
            response = httpx.post(f"{address}/v1/chat/completions", json=asked, timeout=120)
            assert response.status_code == 200, response.text[:300]
            assert response.json()["choices"][0]["message"]["content"].endswith(" what is this?")


def test_replicas_follow_a_ramp_and_no_stream_is_cut(ray_cluster: None) -> None:
    settings = {
        "model": "echo@echo?token_s=0.2",
        "min_replicas": "1",
        "max_replicas": "3",
        "target_ongoing_requests": "6",
        "upscale_delay_s": "2",
        "downscale_delay_s": "6",
        "max_num_seqs": "16",
    }
    curve: list[tuple[float, int, int]] = []
    with service(**settings, max_queued_requests="32") as address:
        ends, start, stages = Ends(), time.monotonic(), [(2, 15), (18, 30), (2, 40)]

        async def watch(clients: list[int]) -> None:
            while True:
                with contextlib.suppress(httpx.HTTPError):
                    found = await asyncio.to_thread(replicas, address)
                    curve.append((round(time.monotonic() - start, 1), clients[0], len(found)))
                await asyncio.sleep(1)

        async def run() -> None:
            clients = [0]
            watching = asyncio.create_task(watch(clients))
            for count, seconds in stages:
                clients[0] = count
                await crowd(address, count, seconds, 20, ends)
            watching.cancel()

        asyncio.run(run())
    record("ramp", {**ends.counts, "seconds_clients_replicas": curve})
    draw(curve, RESULTS / "serve_ramp.png")
    assert ends.wrong == []
    assert set(ends.counts) == {"answered"}
    assert max(found for *_, found in curve) == 3
    assert curve[-1][2] < 3


def draw(curve: list[tuple[float, int, int]], path: Path) -> None:
    """Clients and replicas over time."""
    import matplotlib.pyplot as plt

    times, clients, found = zip(*curve, strict=True)
    figure, axes = plt.subplots(figsize=(7, 3))
    axes.step(times, clients, where="post", label="clients")
    axes.step(times, found, where="post", label="replicas", linewidth=2)
    axes.set(xlabel="seconds", ylabel="count", title="Replicas follow the load")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
