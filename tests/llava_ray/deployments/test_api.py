"""The API in front of an echoing engine, on a real port: OpenAI's own client, streams, errors, clients that leave."""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from pictures import picture
from prometheus_client.parser import text_string_to_metric_families
from serving import EchoEngine, asking, data_uri, served
from starlette.types import Receive, Scope, Send

from llava_ray.deployments.front import build_front
from llava_ray.deployments.gateway import LocalGateway
from llava_ray.deployments.http.auth import ApiKey, digest
from llava_ray.deployments.http.routes import Front
from llava_ray.deployments.replica import Replica
from llava_ray.deployments.settings import ServeSettings
from llava_ray.deployments.tracing import traced
from llava_ray.generate.engine import GenerationChunk
from llava_ray.generate.sampling import not_finite_error

pytestmark = pytest.mark.slow

KEY = "a key of more than sixteen characters"


class Service:
    """An address, and the engine behind it."""

    def __init__(self, address: str, engine: EchoEngine) -> None:
        self.address = address
        self.engine = engine
        self.http = httpx.Client(base_url=address, timeout=10)
        self.openai = openai.OpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=0, timeout=10)

    def until(self, condition: str, seconds: float = 1.0) -> float:
        """Wait until the engine is as told; return how long that took."""
        start = time.monotonic()
        while not eval(condition, {"engine": self.engine}):
            assert time.monotonic() - start < seconds, f"not {condition} within {seconds} s"
            time.sleep(0.005)
        return time.monotonic() - start


@contextlib.contextmanager
def service(engine: EchoEngine | None = None, keys: tuple[ApiKey, ...] = (), **settings: object) -> Iterator[Service]:
    engine = engine or EchoEngine()
    made = ServeSettings.parsed({"model": "echo@somewhere", "max_num_seqs": 4, **settings})
    [source] = made.sources
    front = Front(LocalGateway({source: Replica(engine, source, made)}), made, keys)
    with served(build_front(front)) as address:
        yield Service(address, engine)


@pytest.fixture(scope="module")
def echo() -> Iterator[Service]:
    with service(adapters="pirate@elsewhere") as running:
        yield running


@pytest.fixture(scope="module")
def slow() -> Iterator[Service]:
    with service(EchoEngine(prefill_s=0.2, token_s=0.05, max_num_seqs=2), max_num_seqs=2, max_queued_requests=1) as it:
        yield it


def error_of(response: httpx.Response) -> dict[str, object]:
    """The error object of a response, which must be whole."""
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


def test_the_openai_client_streams_a_question_about_two_images(echo: Service) -> None:
    images = [data_uri(picture(40, 30)), data_uri(picture(7, 5, kind="JPEG"), "image/jpeg")]
    stream = echo.openai.chat.completions.create(
        **asking("which is larger?", *images), stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == "40x30 7x5 which is larger?"
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]][-1] == "stop"
    assert (chunks[-1].choices, chunks[-1].usage.prompt_tokens, chunks[-1].usage.completion_tokens) == ([], 37, 5)
    assert {chunk.id for chunk in chunks} == {chunks[0].id}


def test_the_engine_hears_what_was_asked(echo: Service) -> None:
    asked = asking(
        "again", data_uri(picture()), temperature=0.5, top_p=0.9, max_tokens=7, stop=["END", "\n"], seed=3, top_k=5
    )
    asked["messages"] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "what is this?"},
        {"role": "assistant", "content": "a square"},
        *asked["messages"],
    ]
    assert (
        echo.http.post("/v1/chat/completions", json=asked).json()["choices"][0]["message"]["content"] == "40x30 again"
    )
    heard = echo.engine.seen[-1]
    assert heard.system == "Be brief."
    assert [(turn.role, turn.value) for turn in heard.turns] == [
        ("human", "what is this?"),
        ("gpt", "a square"),
        ("human", "<image>\nagain"),
    ]
    assert heard.images == (picture(),)
    sampling = heard.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.max_tokens) == (0.5, 0.9, 5, 7)
    assert (sampling.stop, sampling.seed, sampling.logprobs) == (("END", "\n"), 3, None)


def test_choices_have_seeds_of_their_own(echo: Service) -> None:
    answer = echo.openai.chat.completions.create(**asking("one two"), n=3, seed=10)
    assert [choice.message.content for choice in answer.choices] == ["one two"] * 3
    assert sorted(request.sampling.seed for request in echo.engine.seen[-3:]) == [10, 11, 12]
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (2, 6)


def test_several_choices_stream_side_by_side(echo: Service) -> None:
    texts = ["", ""]
    for chunk in echo.openai.chat.completions.create(**asking("one two three"), n=2, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == ["one two three"] * 2


def test_stop_length_and_logprobs(echo: Service) -> None:
    ask = echo.openai.chat.completions.create
    stopped = ask(**asking("one two three"), stop="two", logprobs=True, top_logprobs=2).choices[0]
    assert (stopped.message.content, stopped.finish_reason) == ("one", "stop")
    assert [top.token for top in stopped.logprobs.content[0].top_logprobs] == ["one", "other"]
    cut = ask(**asking("one two three"), max_completion_tokens=2).choices[0]
    assert (cut.message.content, cut.finish_reason, cut.logprobs) == ("one two", "length", None)


def test_completions(echo: Service) -> None:
    whole = echo.openai.completions.create(model="echo", prompt="go on please", logprobs=1)
    assert whole.choices[0].text == "go on please"
    assert whole.choices[0].logprobs.text_offset == [0, 2, 5]
    stream = echo.openai.completions.create(model="echo", prompt=["go on"], stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == "go on"
    assert echo.engine.seen[-1].prompt == "go on"


def test_models_and_adapters_are_listed_with_what_they_can_do(echo: Service) -> None:
    models = {model.id: model for model in echo.openai.models.list()}
    assert list(models) == ["echo", "pirate"]
    assert models["pirate"].parent == "echo"
    assert echo.http.get("/v1/models/echo").json()["capabilities"]["vision"] is True
    assert echo.openai.chat.completions.create(**{**asking("ahoy"), "model": "pirate"}).choices[0].message.content == (
        "pirate ahoy"
    )
    with pytest.raises(openai.NotFoundError, match="available: echo, pirate"):
        echo.openai.chat.completions.create(**{**asking("hello"), "model": "gpt-4"})


def test_health_readiness_and_unknown_paths(echo: Service) -> None:
    assert echo.http.get("/health").json() == {"status": "ok"}
    assert echo.http.get("/ready").json() == {"ready": True, "models": {"echo": True}}
    missing = echo.http.get("/v1/nothing")
    assert (missing.status_code, error_of(missing)["code"]) == (404, "unknown_path")
    wrong = echo.http.get("/v1/chat/completions")
    assert (wrong.status_code, error_of(wrong)["code"]) == (404, "unknown_path")


def test_metrics_have_the_names_that_dashboards_know(echo: Service) -> None:
    echo.openai.chat.completions.create(**asking("count me"))
    text = echo.http.get("/metrics").text
    samples = {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    where = (("engine", "echo"), ("model_name", "echo"))
    assert samples["vllm:time_to_first_token_seconds_count", *where] >= 1
    assert samples["vllm:generation_tokens_total", *where] == echo.engine.num_tokens
    assert samples["vllm:num_requests_running", *where] == 0
    assert samples["vllm:request_success_total", where[0], ("finished_reason", "stop"), where[1]] >= 1
    assert text.count("# TYPE vllm:inter_token_latency_seconds histogram") == 1


def test_a_full_queue_says_when_to_come_back_and_nothing_is_decoded(slow: Service) -> None:
    async def burst() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=slow.address, timeout=10) as client:
            asked = [asking(f"number {index} of many", data_uri(picture())) for index in range(12)]
            return await asyncio.gather(*(client.post("/v1/chat/completions", json=one) for one in asked))

    before = len(slow.engine.seen)
    responses = asyncio.run(burst())
    answered = [index for index, response in enumerate(responses) if response.status_code == 200]
    assert len(answered) == 3 == len(slow.engine.seen) - before
    for index, response in enumerate(responses):
        if index in answered:
            assert response.json()["choices"][0]["message"]["content"] == f"40x30 number {index} of many"
        else:
            assert (response.status_code, response.headers["retry-after"]) == (429, "2")
            assert error_of(response)["type"] == "rate_limit_error"


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_a_client_that_leaves_frees_its_place(slow: Service, stream: bool, phase: str) -> None:
    slow.engine.prefill_s, slow.engine.token_s = (30, 0) if phase == "prefill" else (0, 0.05)
    before = slow.engine.num_cancelled
    with pytest.raises(httpx.ReadTimeout), httpx.Client(timeout=0.5) as client:
        asked = asking(" ".join(["word"] * 500), stream=stream)
        with client.stream("POST", f"{slow.address}/v1/chat/completions", json=asked) as response:
            if phase == "decode" and stream:
                next(response.iter_lines())
                raise httpx.ReadTimeout("enough")
            response.read()
    slow.until("not engine.running and not engine.waiting")
    assert slow.engine.num_cancelled == before + 1
    slow.engine.prefill_s, slow.engine.token_s = 0.2, 0.05


def test_failures_say_what_failed(echo: Service) -> None:
    echo.engine.broken = "its loop died"
    try:
        for stream in (False, True):
            failed = echo.http.post("/v1/chat/completions", json=asking("hello", stream=stream))
            assert (failed.status_code, error_of(failed)["code"]) == (500, "engine_failed")
            assert "its loop died" in failed.text
    finally:
        echo.engine.broken = None


def test_an_engine_that_dies_in_the_middle_ends_the_stream_with_an_error(echo: Service) -> None:
    class Dying(EchoEngine):
        async def words(self, *arguments):
            yield await anext(super().words(*arguments))
            from llava_ray.errors import ModelError

            raise ModelError("out of memory")

    with service(Dying()) as dying:
        with pytest.raises(openai.APIError, match="out of memory"):
            list(dying.openai.chat.completions.create(**asking("one two"), stream=True))
        lines = dying.http.post("/v1/chat/completions", json=asking("one two", stream=True)).text.strip().splitlines()
        assert json.loads(lines[-1].removeprefix("data: "))["error"]["code"] == "engine_failed"


def test_keys_are_asked_for_everywhere_but_at_health() -> None:
    with service(keys=(ApiKey("alice", digest(KEY)),)) as guarded:
        assert guarded.http.get("/health").status_code == 200
        for path in ("/v1/models", "/metrics"):
            refused = guarded.http.get(path, headers={"authorization": "Bearer wrong"})
            assert (refused.status_code, error_of(refused)["code"]) == (401, "invalid_api_key")
        assert [model.id for model in guarded.openai.models.list()] == ["echo"]


def test_keys_are_asked_for_under_a_prefix_too() -> None:
    """Serve mounts an application under its route_prefix by telling it a root_path."""
    settings = ServeSettings.parsed({"model": "echo@somewhere"})
    [source] = settings.sources
    gateway = LocalGateway({source: Replica(EchoEngine(), source, settings)})
    front = build_front(Front(gateway, settings, (ApiKey("alice", digest(KEY)),)))

    async def mounted(scope: Scope, receive: Receive, send: Send) -> None:
        await front({**scope, "root_path": "/llava"}, receive, send)

    async def statuses() -> list[int]:
        transport = httpx.ASGITransport(mounted)
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            right = {"authorization": f"Bearer {KEY}"}
            return [
                (await client.get("/llava/health")).status_code,
                (await client.get("/llava/v1/models")).status_code,
                (await client.get("/llava/v1/models", headers=right)).status_code,
                (await client.get("/llava/metrics")).status_code,
            ]

    assert asyncio.run(statuses()) == [200, 401, 200, 401]


def test_each_key_has_a_rate_of_its_own() -> None:
    keys = (ApiKey("alice", digest(KEY), requests_per_minute=4), ApiKey("bob", digest(KEY + "b")))
    with service(keys=keys) as guarded:
        assert guarded.openai.models.list()
        with pytest.raises(openai.RateLimitError, match="alice") as refused:
            guarded.openai.models.list()
        assert 1 <= int(refused.value.response.headers["retry-after"]) <= 16
        for _ in range(3):
            assert guarded.openai.with_options(api_key=KEY + "b").models.list()


def test_cors_is_closed_until_an_origin_is_named(echo: Service) -> None:
    asked = {"origin": "https://page.example", "access-control-request-method": "POST"}
    assert "access-control-allow-origin" not in echo.http.options("/v1/chat/completions", headers=asked).headers
    assert "access-control-allow-origin" not in echo.http.get("/v1/models", headers=asked).headers
    with service(cors_allowed_origins="https://page.example") as opened:
        allowed = opened.http.options("/v1/chat/completions", headers=asked).headers
        assert allowed["access-control-allow-origin"] == "https://page.example"


def test_traces_hold_figures_and_no_texts(tmp_path: Path) -> None:
    import mlflow

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    settings = ServeSettings.parsed({"model": "echo@somewhere"})
    [source] = settings.sources
    gateway = traced(LocalGateway({source: Replica(EchoEngine(), source, settings)}), uri)
    with served(build_front(Front(gateway, settings))) as address:
        httpx.post(f"{address}/v1/chat/completions", json=asking("a secret word", data_uri(picture())))
        httpx.post(f"{address}/v1/chat/completions", json=asking("what?", data_uri(b"no image")))
    mlflow.flush_trace_async_logging()
    traces = mlflow.search_traces(return_type="list")
    spans = sorted((trace.data.spans[0] for trace in traces), key=lambda span: span.start_time_ns)
    assert [span.attributes["end"] for span in spans] == ["stop", "image_unreadable"]
    assert (spans[0].attributes["generation_tokens"], spans[0].attributes["num_images"]) == (4, 1)
    assert "secret" not in str([trace.to_json() for trace in traces])


class Spoiled(EchoEngine):
    """Says its first word, and then that its logits are not finite."""

    async def words(self, *arguments: Any) -> AsyncGenerator[GenerationChunk, None]:
        yield await anext(super().words(*arguments))
        raise not_finite_error("token 2 of this answer")


def test_logits_that_are_not_finite_are_a_500_that_says_so() -> None:
    with service(Spoiled()) as spoiled:
        whole = spoiled.http.post("/v1/chat/completions", json=asking("one two", logprobs=True))
        assert whole.status_code == 500
        assert "logits are not finite (token 2 of this answer" in str(error_of(whole)["message"])
        stream = spoiled.http.post("/v1/chat/completions", json=asking("one two", stream=True))
        last = json.loads(stream.text.strip().splitlines()[-1].removeprefix("data: "))
        assert "logits are not finite" in last["error"]["message"]
        assert "[DONE]" not in stream.text
