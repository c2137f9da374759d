"""What an engine is told by the service's settings, and what the service tells about its memory."""

import asyncio
import logging
from collections.abc import AsyncGenerator

import pytest
from serving import EchoEngine

from llava_ray.deployments.applications import log_where_serve_does
from llava_ray.deployments.builtin import make_engine as make_builtin
from llava_ray.deployments.http.responses import Choice, usage
from llava_ray.deployments.messages import Task
from llava_ray.deployments.metrics import ReplicaMetrics, render_metrics
from llava_ray.deployments.refusal import Refused
from llava_ray.deployments.replica import Replica
from llava_ray.deployments.settings import ServeSettings
from llava_ray.deployments.vllm import make_engine as make_vllm
from llava_ray.errors import BusyError, ConfigError, RecordError
from llava_ray.generate.engine import EngineStats, GenerationChunk, GenerationRequest
from llava_ray.generate.settings import EngineSettings


def test_an_engine_gets_its_settings_by_their_own_names() -> None:
    given = {
        "engine.kv_cache_bytes": "1000",
        "engine.kv_cache_tokens": "10",
        "engine.memory_share": "0.5",
        "engine.prefix_cache_share": "0.25",
        "engine.prefill_chunk": "64",
        "engine.speculative_tokens": "0",
        "engine.max_waiting_tokens": "99",
        "engine.image_cache_bytes": "7",
        "engine.packed_weight_bytes": "8",
    }
    settings = ServeSettings.parsed({"model": "a", **given})
    assert make_builtin(settings.sources[0], settings).settings == EngineSettings(
        max_running=32,
        prefill_chunk=64,
        kv_cache_tokens=10,
        kv_cache_bytes=1000,
        memory_share=0.5,
        prefix_cache_share=0.25,
        speculative_tokens=0,
        image_cache_bytes=7,
        max_waiting_tokens=99,
        packed_weight_bytes=8,
    )
    assert settings.replaced({"max_images": 2}).engine_kv_cache_bytes == 1000
    with pytest.raises(ConfigError, match=r"'engine.memory_share' = '7'.*unknown key 'engine.kv_bytes'"):
        ServeSettings.parsed({"model": "a", "engine.memory_share": "7", "engine.kv_bytes": 1})


def test_replicas_that_may_share_a_machine_share_its_memory() -> None:
    def share(**given: object) -> float | None:
        settings = ServeSettings.parsed({"model": "a", **given})
        return make_builtin(settings.sources[0], settings).settings.memory_share

    assert share() == 0.25
    assert share(max_replicas=4) == 0.0625
    assert share(model="a,b", max_replicas=2) == 0.0625
    assert share(**{"engine.memory_share": 0.5, "max_replicas": 4}) == 0.5  # as it says


def test_a_busy_engine_asks_to_come_back() -> None:
    class Busy(EchoEngine):
        async def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationChunk, None]:
            raise BusyError("5,000 tokens wait")
            yield  # a generator

    settings = ServeSettings.parsed({"model": "echo@x"})
    replica = Replica(Busy(), settings.sources[0], settings)

    async def run() -> list[object]:
        return [item async for item in replica.run(Task("id", "echo", prompt="hi"))]

    assert asyncio.run(run()) == [Refused(429, "5,000 tokens wait", "queue_full", retry_after_s=settings.retry_after_s)]


@pytest.mark.parametrize(
    ("task", "param"), [(Task("id", "echo"), "messages"), (Task("id", "echo", prompt="hi"), "prompt")]
)
def test_a_request_that_can_never_fit_is_refused_with_its_field(task: Task, param: str) -> None:
    class Small(EchoEngine):
        async def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationChunk, None]:
            raise RecordError("this engine holds 384 tokens (its KV cache has 400)", reason="too_long")
            yield  # a generator

    settings = ServeSettings.parsed({"model": "echo@x"})
    replica = Replica(Small(), settings.sources[0], settings)

    async def run() -> list[object]:
        return [item async for item in replica.run(task)]

    [refused] = asyncio.run(run())
    assert refused == Refused(400, "this engine holds 384 tokens (its KV cache has 400)", "too_long", param)


def test_metrics_tell_memory_and_what_was_known() -> None:
    stats = EngineStats(1, 2, 300, 600, 50, 40, 1, 2, 0, 9000, 50, 20, 128, 30, 25)
    text = render_metrics({"r": ReplicaMetrics("m").collect(stats)}).decode()
    values = {line.partition("{")[0]: float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line[0] != "#"}
    assert (values["llava_ray:kv_cache_tokens"], values["llava_ray:kv_cache_bytes"]) == (600, 9000)
    assert (values["vllm:prefix_cache_queries_total"], values["vllm:prefix_cache_hits_total"]) == (50, 20)
    assert values["llava_ray:prefix_cache_tokens"] == 128
    assert values["vllm:spec_decode_num_draft_tokens_total"] == 30
    assert values["vllm:spec_decode_num_accepted_tokens_total"] == 25


def test_a_replica_logs_where_serve_does(monkeypatch: pytest.MonkeyPatch) -> None:
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    monkeypatch.setattr(handler, "emit", records.append)
    ours = logging.getLogger("llava_ray")
    monkeypatch.setattr(ours, "handlers", [])
    monkeypatch.setattr(ours, "level", ours.level)
    monkeypatch.setattr(logging.getLogger("ray.serve"), "handlers", [handler])
    for _ in range(2):
        log_where_serve_does()
    logging.getLogger("llava_ray.generate").info("KV cache: 2 GiB")
    assert [record.getMessage() for record in records] == ["KV cache: 2 GiB"]


def test_usage_says_how_much_of_the_prompt_was_known() -> None:
    choices = [Choice(), Choice()]
    for choice, known in zip(choices, (32, 48), strict=True):
        choice.add(GenerationChunk("a", (1,), num_prompt_tokens=60, num_cached_tokens=known))
        choice.add(GenerationChunk("b", (2, 3), finish_reason="stop", num_prompt_tokens=60, num_cached_tokens=known))
    assert usage(choices) == {
        "prompt_tokens": 60,
        "completion_tokens": 6,
        "total_tokens": 66,
        "prompt_tokens_details": {"cached_tokens": 32},  # the other 16 were known from the first choice
    }


def test_vllm_gets_what_it_has_names_for() -> None:
    given = {"engine.kv_cache_bytes": 5, "engine.memory_share": 0.7, "engine.prefill_chunk": 9}
    settings = ServeSettings.parsed({"model": "a", "num_gpus": 1, **given, "engine.prefix_cache_share": 0})
    made = make_vllm(settings.sources[0], settings).settings
    assert (made.kv_cache_bytes, made.memory_share, made.prefill_chunk, made.prefix_cache) == (5, 0.7, 9, False)
    plain = ServeSettings.parsed({"model": "a", "num_gpus": 1})
    assert make_vllm(plain.sources[0], plain).settings.kv_cache_bytes is None
    on_cpu = ServeSettings.parsed({"model": "a"})
    assert make_vllm(on_cpu.sources[0], on_cpu).settings.kv_cache_bytes == 2 * 2**30
