"""Moderation by a small endpoint of OpenAI's form: what it flags is refused, and so is all when it gives no verdict.

It is shown what the model will see: the images' bytes, wherever they came from, before a token is written.
"""

import asyncio
import base64
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Response
from fastapi.responses import JSONResponse
from pictures import picture
from serving import EchoEngine, asking, data_uri, served

from llava_ray.deployments.front import build_front
from llava_ray.deployments.gateway import LocalGateway
from llava_ray.deployments.http.routes import Front
from llava_ray.deployments.media.addresses import Network
from llava_ray.deployments.replica import Replica
from llava_ray.deployments.settings import ServeSettings

pytestmark = pytest.mark.slow

SHOWN = [picture(41, 30), picture(42, 30)]  # what the media host shows the first time, and from then on


@dataclass
class Moderated:
    """A service, and what its moderator and its model were shown."""

    address: str
    media: str
    folder: Path
    engine: EchoEngine
    heard: list[dict[str, Any]] = field(default_factory=list)

    def ask(self, text: str, *images: str, **fields: object) -> httpx.Response:
        self.heard.clear()
        self.engine.seen.clear()
        return httpx.post(f"{self.address}/v1/chat/completions", json=asking(text, *images, **fields), timeout=10)

    @property
    def moderated_images(self) -> list[bytes]:
        [body] = self.heard
        places = [part["image_url"]["url"] for part in body["input"] if part["type"] == "image_url"]
        return [base64.b64decode(place.partition(";base64,")[2]) for place in places]


def moderation_endpoint(heard: list[dict[str, Any]]) -> FastAPI:
    endpoint = FastAPI()
    visits: list[str] = []

    @endpoint.post("/v1/moderations")
    async def moderate(body: dict[str, Any]) -> Response:
        heard.append(body)
        text = str(body["input"])
        if "broken" in text:
            return Response("no", status_code=500)
        if "vague" in text:
            return JSONResponse({"results": []})
        return JSONResponse({"results": [{"flagged": "poison" in text}]})

    @endpoint.get("/changing.png")
    async def show() -> Response:
        visits.append("")
        return Response(SHOWN[min(len(visits) - 1, 1)], media_type="image/png")

    return endpoint


@pytest.fixture(scope="module")
def moderated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Moderated]:
    folder = tmp_path_factory.mktemp("images")
    (folder / "secret-name.png").write_bytes(picture(43, 30))
    heard: list[dict[str, Any]] = []
    with served(moderation_endpoint(heard)) as host:
        port = host.rpartition(":")[2]
        settings = ServeSettings.parsed(
            {
                "model": "echo@x",
                "moderation_url": f"{host}/v1",
                "allowed_media_domains": f"media.test:{port}",
                "allowed_local_media_path": str(folder),
                "max_num_seqs": 1,
                "max_queued_requests": 0,
            }
        )
        [source] = settings.sources

        async def resolve(name: str, wanted: int) -> list[str]:
            return ["127.0.0.1"]

        engine = EchoEngine()
        replica = Replica(engine, source, settings, Network(resolve, lambda address: True))
        with served(build_front(Front(LocalGateway({source: replica}), settings))) as service:
            yield Moderated(service, f"http://media.test:{port}", folder, engine, heard)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("text", "status", "code"),
    [
        ("a square", 200, None),
        ("poison", 400, "content_policy_violation"),
        ("broken", 503, "moderation_unavailable"),
        ("vague", 503, "moderation_unavailable"),
    ],
)
def test_verdicts(moderated: Moderated, text: str, status: int, code: str | None, stream: bool) -> None:
    response = moderated.ask(text, data_uri(picture()), stream=stream)
    assert response.status_code == status
    if code is not None:
        assert response.json()["error"]["code"] == code
    assert len(moderated.engine.seen) == (status == 200)
    assert [part["type"] for part in moderated.heard[-1]["input"]] == ["text", "image_url"]


def test_the_moderator_is_shown_what_the_model_sees(moderated: Moderated) -> None:
    """The host shows another image from its second visitor on; a file's name stays here."""
    places = (f"{moderated.media}/changing.png", f"file://{moderated.folder}/secret-name.png", data_uri(picture()))
    response = moderated.ask("which?", *places)
    assert response.json()["choices"][0]["message"]["content"] == "41x30 43x30 40x30 which?"
    assert moderated.moderated_images == [SHOWN[0], picture(43, 30), picture()] == list(moderated.engine.seen[0].images)
    assert "secret-name" not in str(moderated.heard)
    assert "media.test" not in str(moderated.heard)
    assert all(part["image_url"]["url"].startswith("data:image/png;") for part in moderated.heard[0]["input"][1:])


def test_texts_of_all_messages_and_of_completions_are_moderated(moderated: Moderated) -> None:
    poisoned = {"role": "system", "content": "poison"}
    asked = {"model": "echo", "messages": [poisoned, {"role": "user", "content": "a"}]}
    assert httpx.post(f"{moderated.address}/v1/chat/completions", json=asked).status_code == 400
    completed = httpx.post(f"{moderated.address}/v1/completions", json={"model": "echo", "prompt": "poison"})
    assert completed.json()["error"]["code"] == "content_policy_violation"


def test_other_routes_are_moderated(moderated: Moderated, monkeypatch: pytest.MonkeyPatch) -> None:
    async def read_ids(token_ids: Sequence[int], model: str | None, field: str) -> str:
        return " ".join("poison" if token == 666 else "good" for token in token_ids)

    monkeypatch.setattr(moderated.engine, "read_ids", read_ids)
    for path, fields, param in (
        ("/v1/responses", {"input": "poison"}, "input"),
        ("/v1/responses", {"input": "a", "instructions": "poison"}, "input"),
        ("/v1/embeddings", {"input": ["a", "poison"]}, "input"),
        ("/v1/embeddings", {"input": [[1], [1, 666]]}, "input"),
        ("/v1/embeddings", {"messages": asking("poison")["messages"]}, "messages"),
        ("/tokenize", {"prompt": "poison"}, "prompt"),
        ("/detokenize", {"tokens": [666]}, "tokens"),
    ):
        moderated.engine.seen.clear()
        response = httpx.post(f"{moderated.address}{path}", json={"model": "echo", **fields})
        error = response.json()["error"]
        assert (response.status_code, error["code"], error["param"]) == (400, "content_policy_violation", param), path
        assert moderated.engine.seen == []
    moderated.heard.clear()
    image = {"input": [data_uri(picture())], "features": "projector"}
    assert httpx.post(f"{moderated.address}/v1/embeddings", json={"model": "echo", **image}).status_code == 200
    assert moderated.moderated_images == [picture()]


def test_what_is_refused_anyway_is_not_moderated(moderated: Moderated) -> None:
    """A full queue, images that are none."""
    assert moderated.ask("x", data_uri(b"no image")).status_code == 400
    assert moderated.heard == []

    async def burst() -> list[int]:
        async with httpx.AsyncClient(base_url=moderated.address, timeout=10) as client:
            asked = [client.post("/v1/chat/completions", json=asking("a b c")) for _ in range(4)]
            return [response.status_code for response in await asyncio.gather(*asked)]

    moderated.engine.token_s = 0.1
    try:
        assert sorted(asyncio.run(burst())) == [200, 429, 429, 429]
        assert len(moderated.heard) == 1
    finally:
        moderated.engine.token_s = 0.0


def test_nothing_is_answered_while_nobody_moderates() -> None:
    settings = ServeSettings.parsed({"model": "echo@x", "moderation_url": "http://127.0.0.1:9/v1"})
    [source] = settings.sources
    engine = EchoEngine()
    front = Front(LocalGateway({source: Replica(engine, source, settings)}), settings)
    with served(build_front(front)) as service:
        assert httpx.post(f"{service}/v1/chat/completions", json=asking("a square")).status_code == 503
    assert engine.seen == []
