"""The application on Ray Serve itself, started once: clients, disconnects, a full queue, a replica that is killed."""

import asyncio
import io
import json
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import openai
import pytest
from commands import free_port
from pictures import noise, picture
from PIL import Image
from serving import asking, data_uri

from llava_ray.deployments.settings import ServeSettings

pytestmark = pytest.mark.ray

ADMIN = "an admin's key, long enough"
SETTINGS = {
    "model": "echo@echo?token_s=0.02,other@echo",
    "adapters": "pirate@somewhere",
    "engine": "serving:make_engine",
    "num_cpus": "0.1",
    "min_replicas": "2",
    "max_replicas": "2",
    "max_num_seqs": "2",
    "max_queued_requests": "3",
    "body_timeout_s": "2",
}


@pytest.fixture(scope="module")
def address(ray_cluster: None) -> Iterator[str]:
    from ray import serve

    from llava_ray.deployments import api

    port = free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(api(SETTINGS | {"max_ingress_replicas": "1"}), name="api", route_prefix="/")
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()


@pytest.fixture(scope="module")
def client(address: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=30)


def counts(address: str, name: str) -> dict[str, float]:
    """The samples of a metric by the replica that they are from."""
    found = {}
    for line in httpx.get(f"{address}/metrics", timeout=10).text.splitlines():
        if line.startswith(f"{name}{{") and 'model_name="echo"' in line:
            engine = line.partition('engine="')[2].partition('"')[0]
            found[engine] = found.get(engine, 0.0) + float(line.rpartition(" ")[2])
    return found


def until(condition: Callable[[], bool], seconds: float) -> float:
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < seconds, "too late"
        time.sleep(0.05)
    return time.monotonic() - start


def test_the_openai_client_streams_an_image_question(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(**asking("what is this?", data_uri(picture())), stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == "40x30 what is this?"


def test_a_plain_http_client_streams_it_too(address: str) -> None:
    asked = asking("what is this?", data_uri(picture()), stream=True, stream_options={"include_usage": True})
    text, usage = "", None
    with httpx.stream("POST", f"{address}/v1/chat/completions", json=asked, timeout=10) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    for event in map(json.loads, lines[:-1]):
        usage = event["usage"] or usage
        for choice in event["choices"]:
            text += choice["delta"].get("content", "")
    assert (text, usage["completion_tokens"], lines[-1]) == ("40x30 what is this?", 4, "[DONE]")


def test_responses_features_and_tokens(address: str, client: openai.OpenAI) -> None:
    asked = [{"role": "user", "content": [{"type": "input_image", "image_url": data_uri(picture())},
                                          {"type": "input_text", "text": "what is this?"}]}]  # fmt: skip
    events = list(client.responses.create(model="echo", input=asked, stream=True))  # type: ignore[arg-type]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert events[-1].response.output_text == "40x30 what is this?"
    texts = ["a" * number for number in range(1, 30)]
    found = client.embeddings.create(model="pirate", input=texts).data
    assert [one.embedding for one in found] == [[1.0, number] for number in range(1, 30)]
    read = httpx.post(f"{address}/tokenize", json={"model": "other", "prompt": "a b", "return_token_strs": True})
    assert read.json() == {"count": 2, "max_model_len": 2048, "tokens": [0, 1], "token_strs": ["a", "b"]}
    assert httpx.post(f"{address}/detokenize", json={"tokens": [4, 2]}).json() == {"prompt": "4 2"}


def test_models_adapters_readiness_and_metrics_of_all_replicas(address: str, client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["echo", "pirate", "other"]
    for name, said in (("other", "hello"), ("pirate", "pirate hello")):
        assert client.chat.completions.create(**{**asking("hello"), "model": name}).choices[0].message.content == said
    assert httpx.get(f"{address}/ready").json() == {"ready": True, "models": {"echo": True, "other": True}}
    assert len(counts(address, "vllm:num_requests_running")) == 2
    assert sum(counts(address, "vllm:request_success_total").values()) >= 1


def test_a_chat_stays_with_its_replica(address: str, client: openai.OpenAI) -> None:
    before = counts(address, "vllm:request_success_total")
    messages = [{"role": "user", "content": "a chat of several turns"}]
    for turn in range(6):
        answer = client.chat.completions.create(model="echo", messages=messages).choices[0].message.content
        messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": f"turn {turn}"}]
    after = counts(address, "vllm:request_success_total")
    assert sorted(after[name] - before.get(name, 0) for name in after) in ([6], [0, 6])


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_place_within_a_second(address: str, stream: bool) -> None:
    asked = asking(" ".join(["word"] * 1000), stream=stream)
    with httpx.Client(timeout=0.7) as leaving:
        with (
            pytest.raises(httpx.ReadTimeout),
            leaving.stream("POST", f"{address}/v1/chat/completions", json=asked) as it,
        ):
            for index, _ in enumerate(it.iter_lines()):
                if index > 20:
                    raise httpx.ReadTimeout("enough")
        start = time.monotonic()
    until(lambda: not any(counts(address, "vllm:num_requests_running").values()), 1.0)
    assert time.monotonic() - start < 1.2


def test_more_than_fit_are_told_when_to_come_back(address: str) -> None:
    """Two replicas with five places each."""

    async def burst() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=address, timeout=60) as many:
            texts = [f"question {index} " + "word " * 100 for index in range(16)]
            return await asyncio.gather(*(many.post("/v1/chat/completions", json=asking(text)) for text in texts))

    responses = asyncio.run(burst())
    answered = [index for index, response in enumerate(responses) if response.status_code == 200]
    assert 5 <= len(answered) <= 10
    for index, response in enumerate(responses):
        if index in answered:
            assert response.json()["choices"][0]["message"]["content"].startswith(f"question {index} word")
        else:
            assert (response.status_code, response.headers["retry-after"]) == (429, "2")
            assert response.json()["error"]["code"] == "queue_full"


def test_bodies_are_bounded_through_serves_proxy_too(address: str) -> None:
    host, port = address.removeprefix("http://").split(":")
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: {host}\r\ncontent-length: "
    over = ServeSettings(model=("echo",)).max_body_bytes + 1
    for length, status, seconds in ((over, b" 413 ", 1.0), (1000, b" 408 ", 3.5)):
        start = time.monotonic()
        with socket.create_connection((host, int(port)), timeout=5) as connection:
            connection.sendall(f"{head}{length}\r\n\r\nx".encode())
            answer = connection.recv(4096)
        assert status in answer.splitlines()[0]
        assert time.monotonic() - start < seconds


@pytest.mark.parametrize(("count", "stream"), [(1, False), (1, True), (3, True)])
def test_images_and_bodies_at_the_documented_limits_are_answered(address: str, count: int, stream: bool) -> None:
    """One image of almost max_image_bytes, and several that together make a body of almost max_body_bytes."""
    limits = ServeSettings(model=("echo",))
    image = noise(limits.max_image_bytes if count == 1 else limits.max_body_bytes * 3 // 4 // count - 1000)
    body = json.dumps(asking("what is this?", *[data_uri(image)] * count, stream=stream)).encode()
    assert 0 < limits.max_image_bytes - len(image) < 30_000 or limits.max_body_bytes - len(body) < 300_000
    assert len(body) <= limits.max_body_bytes
    headers = {"content-type": "application/json"}
    response = httpx.post(f"{address}/v1/chat/completions", content=body, headers=headers, timeout=60)
    assert response.status_code == 200, response.text[:300]
    size = "{}x{}".format(*Image.open(io.BytesIO(image)).size)
    expected = f"{size} " * count + "what is this?"
    if stream:
        events = [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: {")]
        said = "".join(choice["delta"].get("content", "") for event in events for choice in event["choices"])
        assert (said, response.text[-14:]) == (expected, "data: [DONE]\n\n")
    else:
        assert response.json()["choices"][0]["message"]["content"] == expected


def test_a_long_answer_with_everything_asked_for_arrives_whole(address: str) -> None:
    """As many choices as one replica takes, with log-probabilities: from replica to front one message of 5 MB."""
    asked = asking("word " * 8000, n=5, logprobs=True, top_logprobs=2, max_tokens=8000) | {"model": "other"}
    response = httpx.post(f"{address}/v1/chat/completions", json=asked, timeout=60)
    assert response.status_code == 200, response.text[:300]
    assert [len(choice["logprobs"]["content"]) for choice in response.json()["choices"]] == [8000] * 5


def test_a_killed_replica_ends_its_streams_with_an_error_and_others_take_the_rest(
    address: str, client: openai.OpenAI
) -> None:
    pids = replica_pids(client)

    async def run() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=60) as many:

            async def one(index: int) -> str:
                text = f"number {index} " + "word " * 150
                said = ""
                try:
                    async for chunk in await many.chat.completions.create(**asking(text), stream=True):
                        said += chunk.choices[0].delta.content or ""
                except openai.APIError as error:
                    return str(error)
                return "answered" if said == text.strip() else f"mixed up: {said}"

            tasks = [asyncio.create_task(one(index)) for index in range(6)]
            await asyncio.sleep(1.5)
            os.kill(pids[0], signal.SIGKILL)
            return await asyncio.gather(*tasks)

    ends = asyncio.run(run())
    lost = [end for end in ends if "was lost" in end]
    assert 1 <= len(lost) <= 2, ends  # what it was writing; what waited in it is written by the other
    assert ends.count("answered") == 6 - len(lost), ends
    until(lambda: len(counts(address, "vllm:num_requests_running")) == 2, 45)
    assert pids[0] not in replica_pids(client)


def test_an_adapter_is_known_to_all_ingresses_and_replicas_and_to_new_ones(address: str, tmp_path: Path) -> None:
    from ray import serve

    from llava_ray.deployments import api

    (tmp_path / "adapters" / "one").mkdir(parents=True)
    (tmp_path / "adapters" / "one" / "adapter_config.json").write_text("{}")
    (tmp_path / "keys.toml").write_text(f'[keys.admin]\nkey = "{ADMIN}"\n')
    own = {"admin_keys": "admin", "allowed_adapter_paths": str(tmp_path / "adapters"), "min_ingress_replicas": "2"}
    told = {"model": "echo", "adapters": "", "max_ingress_replicas": "2", "api_keys_file": str(tmp_path / "keys.toml")}
    serve.run(api(SETTINGS | own | told), name="adapters", route_prefix="/adapters")
    place = f"{address}/adapters/v1"
    key = {"authorization": f"Bearer {ADMIN}"}
    try:
        with httpx.Client(headers=key, timeout=60) as http:
            named = {"lora_name": "one", "lora_path": str(tmp_path / "adapters" / "one")}
            loaded = http.post(f"{place}/load_lora_adapter", json=named)
            assert loaded.text == "Success: LoRA adapter 'one' added successfully."
            with openai.OpenAI(base_url=place, api_key=ADMIN, max_retries=0, timeout=30) as client:
                pids = replica_pids(client, model="one")
                assert len(pids) == 2
                for _ in range(10):
                    assert [model.id for model in client.models.list()] == ["echo", "one"]
                os.kill(pids[0], signal.SIGKILL)
                until(lambda: len(set(replica_pids(client, model="one")) - set(pids)) == 1, 60)
                assert http.post(f"{place}/load_lora_adapter", json=named).status_code == 400
                assert http.post(f"{place}/unload_lora_adapter", json={"lora_name": "one"}).status_code == 200
                for _ in range(10):
                    with pytest.raises(openai.NotFoundError):
                        client.chat.completions.create(**{**asking("hello"), "model": "one"})
    finally:
        serve.delete("adapters")


def replica_pids(client: openai.OpenAI, count: int = 2, model: str = "echo") -> list[int]:
    """The processes of the model's replicas, as they say themselves."""
    found = set[int]()
    for index in range(40):
        asked = {**asking(f"PID {index}"), "model": model}
        answer = client.chat.completions.create(**asked).choices[0].message.content
        found.add(int(answer.split()[model != "echo"]))  # an adapter's name comes first
        if len(found) == count:
            break
    return sorted(found)
