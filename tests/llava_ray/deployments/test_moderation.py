"""Moderation by a small endpoint of OpenAI's form: what it flags is refused, and so is all when it gives no verdict."""

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Response
from fastapi.responses import JSONResponse
from pictures import picture
from serving import EchoEngine, asking, data_uri, served

from llava_ray.deployments.front import build_front
from llava_ray.deployments.gateway import LocalGateway
from llava_ray.deployments.replica import Replica
from llava_ray.deployments.routes import Front
from llava_ray.deployments.settings import ServeSettings


@pytest.fixture(scope="module")
def heard() -> list[dict[str, Any]]:
    return []


@pytest.fixture(scope="module")
def address(heard: list[dict[str, Any]]) -> Iterator[str]:
    endpoint = FastAPI()

    @endpoint.post("/v1/moderations")
    async def moderate(body: dict[str, Any]) -> Response:
        heard.append(body)
        text = str(body["input"])
        if "broken" in text:
            return Response("no", status_code=500)
        if "vague" in text:
            return JSONResponse({"results": []})
        return JSONResponse({"results": [{"flagged": "poison" in text}]})

    with served(endpoint) as moderation:
        settings = ServeSettings.parsed({"model": "echo@x", "moderation_url": f"{moderation}/v1"})
        [source] = settings.sources
        front = Front(LocalGateway({source: Replica(EchoEngine(), source, settings)}), settings)
        with served(build_front(front)) as service:
            yield service


@pytest.mark.parametrize(
    ("text", "status", "code"),
    [
        ("a square", 200, None),
        ("poison", 400, "content_policy_violation"),
        ("broken", 503, "moderation_unavailable"),
        ("vague", 503, "moderation_unavailable"),
    ],
)
def test_verdicts(address: str, heard: list[dict[str, Any]], text: str, status: int, code: str | None) -> None:
    response = httpx.post(f"{address}/v1/chat/completions", json=asking(text, data_uri(picture())))
    assert response.status_code == status
    assert response.json().get("error", {}).get("code") == code
    assert [part["type"] for part in heard[-1]["input"]] == ["text", "image_url"]


def test_nothing_is_answered_while_nobody_moderates() -> None:
    settings = ServeSettings.parsed({"model": "echo@x", "moderation_url": "http://127.0.0.1:9/v1"})
    [source] = settings.sources
    engine = EchoEngine()
    front = Front(LocalGateway({source: Replica(engine, source, settings)}), settings)
    with served(build_front(front)) as service:
        assert httpx.post(f"{service}/v1/chat/completions", json=asking("a square")).status_code == 503
    assert engine.seen == []
