"""Drives the whole front in this process with mutated requests, over a tiny model, and says what is no right answer."""

import asyncio
import json
import tempfile
import urllib.parse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engines import make_parts
from pictures import picture
from request_mutations import Asked, make_request
from request_oddities import SECRET
from starlette.types import ASGIApp, Message

from llava_ray.deployments.front import build_front
from llava_ray.deployments.gateway import LocalGateway
from llava_ray.deployments.http.auth import ApiKey, digest
from llava_ray.deployments.http.routes import Front
from llava_ray.deployments.media.addresses import Network
from llava_ray.deployments.replica import Replica
from llava_ray.deployments.settings import ServeSettings
from llava_ray.generate.builtin.builtin_engine import BuiltinEngine
from llava_ray.generate.settings import EngineSettings

KEY = "a key of more than sixteen characters"
# What is told to those who have data or a run in their hands.
TRAINING_ADVICE = ("record", "data.image_folder", "data.max_image_pixels", "to train on", "trained", "training")


class WrongAnswer(Exception):  # noqa: N818 - what a fuzzer finds
    """An answer that no request may have."""


async def call(app: ASGIApp, asked: Asked, authorization: str | None) -> tuple[int, dict[bytes, bytes], bytes]:
    """What an application answers to a request whose client stays until the end; 0 where it has not stayed."""
    headers = list(asked.headers)
    if authorization is not None and not any(name == b"authorization" for name, _ in headers):
        headers.append((b"authorization", authorization.encode()))
    scope: dict[str, Any] = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": asked.method,
        "scheme": "http",
        "path": urllib.parse.unquote(asked.path),
        "raw_path": asked.path.encode(),
        "root_path": "",
        "query_string": asked.query,
        "headers": headers,
        "client": ("127.0.0.1", 40000),
        "server": ("127.0.0.1", 8000),
    }
    coming: list[Message] = [{"type": "http.request", "body": chunk, "more_body": True} for chunk in asked.chunks]
    coming[-1]["more_body"] = False
    if asked.leaves:
        coming[len(coming) // 2 :] = [{"type": "http.disconnect"}]
    sent: list[Message] = []

    async def receive() -> Message:
        if coming:
            return coming.pop(0)
        await asyncio.Event().wait()
        raise AssertionError

    async def send(message: Message) -> None:
        sent.append(message)

    await app(scope, receive, send)
    if not sent:
        return 0, {}, b""
    body = b"".join(message.get("body", b"") for message in sent[1:])
    return sent[0]["status"], dict(sent[0]["headers"]), body


def check(asked: Asked, status: int, headers: dict[bytes, bytes], body: bytes) -> str:
    """What came of a request, in a word. Raises WrongAnswer."""
    if status == 0 and asked.leaves:
        return "left"
    if asked.is_preflight and status in (200, 400):
        return "preflight"
    if asked.method == "HEAD" and (200 <= status < 300 or 400 <= status < 500):
        return f"HEAD {status}"
    if 200 <= status < 300:
        return check_answer(asked, headers.get(b"content-type", b""), body)
    if not 400 <= status < 500:
        raise WrongAnswer(f"status {status}: {body[:600]!r}")
    return f"{status} {check_error(body)}"


def check_answer(asked: Asked, kind: bytes, body: bytes) -> str:
    """A right answer's word."""
    if kind.startswith(b"text/event-stream"):
        events = body.decode().removesuffix("\n\n").split("\n\n")
        if "responses" in asked.path:
            return check_response_events([read(event.partition("data: ")[2]) for event in events])
        if events[-1] != "data: [DONE]":
            raise WrongAnswer(f"a stream ends with {events[-1][:600]!r}")
        for event in events[:-1]:
            read(event.removeprefix("data: "))
        return "200 stream"
    if kind.startswith(b"application/json"):
        value = read(body.decode())
        if "completions" in asked.path and not value["choices"]:
            raise WrongAnswer("no choices")
    return "200"


def check_response_events(events: list[dict[str, Any]]) -> str:
    """The word of a right sequence of a response's events."""
    if [event["sequence_number"] for event in events] != list(range(len(events))):
        raise WrongAnswer("events are not numbered in order")
    if events[-1]["type"] not in ("response.completed", "response.incomplete"):
        raise WrongAnswer(f"a stream ends with {str(events[-1])[:600]}")
    return "200 response stream"


def check_error(body: bytes) -> str:
    """An error's code, if it is OpenAI's object and holds nothing that it should not."""
    value = read(body.decode())
    error = value.get("error")
    if set(value) != {"error"} or set(error) != {"message", "type", "param", "code"}:
        raise WrongAnswer(f"no error object: {body[:600]!r}")
    message = error["message"]
    if not message or len(message) > 700 or not isinstance(error["type"], str) or not isinstance(error["code"], str):
        raise WrongAnswer(f"not a short error object: {body[:900]!r}")
    if not isinstance(error["param"], str | None) or len(error["param"] or "") > 400:
        raise WrongAnswer(f"param: {body[:900]!r}")
    if SECRET[:200] in body.decode():
        raise WrongAnswer(f"repeats the payload: {body[:900]!r}")
    if any(word in message.casefold() for word in TRAINING_ADVICE):
        raise WrongAnswer(f"advises who trains: {message!r}")
    return str(error["code"])


def read(text: str) -> Any:
    """A JSON value of standard numbers."""

    def refuse(constant: str) -> None:
        raise WrongAnswer(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def make_target(make: Callable[[int], Asked] = make_request) -> Callable[[int], str]:
    """A front without keys and one with, over one replica, that get the requests of ``make``."""
    root = Path(tempfile.mkdtemp(prefix="request-fuzz-"))
    (root / "images").mkdir()
    (root / "images" / "red.png").write_bytes(picture())
    parts = make_parts(root / "model")
    loop = asyncio.new_event_loop()
    settings = ServeSettings.parsed(
        {
            "model": "echo@somewhere",
            "max_body_bytes": "1000000",
            "max_tokens": "4",
            "allowed_media_domains": "media.test,inside.test",
            "allowed_local_media_path": str(root / "images"),
        }
    )
    [source] = settings.sources
    engine = BuiltinEngine(lambda: parts, settings=EngineSettings(max_model_len=512, image_cache_bytes=0))
    loop.run_until_complete(engine.start())

    async def resolve(host: str, port: int) -> list[str]:
        if host == "media.test":
            raise OSError("no such name")
        return ["127.0.0.1"]

    gateway = LocalGateway({source: Replica(engine, source, settings, Network(resolve))})
    keys = (ApiKey("tester", digest(KEY)),)
    fronts = [build_front(Front(gateway, settings)), build_front(Front(gateway, settings, keys))]

    def target(seed: int) -> str:
        asked = make(seed)
        guarded = seed % 5 == 0
        answer = call(fronts[guarded], asked, f"Bearer {KEY}" if guarded else None)
        return check(asked, *loop.run_until_complete(answer))

    return target
