"""A client of the page as a program sees it: uploads, events and what they come to, without a browser."""

import json
import uuid
from typing import Any

import httpx
from serving import EchoEngine

from llava_ray.deployments.front import build_front
from llava_ray.deployments.gateway import LocalGateway
from llava_ray.deployments.http.auth import ApiKey, digest
from llava_ray.deployments.http.routes import Front
from llava_ray.deployments.replica import Replica
from llava_ray.deployments.settings import ServeSettings

KEY = "a key of more than sixteen characters"
KEY_OF_BOB = "another key of more than sixteen characters"


def build_page(*, keys: bool = False, **settings: object) -> tuple[Any, Front]:
    """An app with API and page over an engine that echoes; ``keys`` lets only alice and bob in."""
    told = ServeSettings.parsed({"model": "echo@x", **settings})
    [source] = told.sources
    gateway = LocalGateway({source: Replica(EchoEngine(), source, told)})
    known = [ApiKey("alice", digest(KEY)), ApiKey("bob", digest(KEY_OF_BOB))]
    front = Front(gateway, told, known if keys else [])
    return build_front(front, with_page=True), front


class PageClient:
    """A session with the page."""

    def __init__(self, address: str, *, local_address: str = "127.0.0.1", **headers: str) -> None:
        transport = httpx.HTTPTransport(local_address=local_address)
        self.http = httpx.Client(base_url=address, timeout=30, transport=transport, headers=headers)
        self.session = uuid.uuid4().hex[:10]

    def log_in(self, name: str = "alice", key: str = KEY) -> httpx.Response:
        return self.http.post("/login", data={"username": name, "password": key})

    def dependencies(self) -> list[dict[str, Any]]:
        return list(self.http.get("/config").json()["dependencies"])

    def upload(self, data: bytes, name: str = "image.png") -> str:
        response = self.http.post("/gradio_api/upload", files={"files": (name, data)})
        response.raise_for_status()
        return str(response.json()[0])

    def join(self, number: int, data: list[Any], **event: Any) -> httpx.Response:
        body = {"data": data, "fn_index": number, "session_hash": self.session, **event}
        return self.http.post("/gradio_api/queue/join", json=body)

    def outcome(self) -> dict[str, Any]:
        """What the last event came to: its output, or its error."""
        return self.outcomes(1)[0]

    def outcomes(self, count: int) -> list[dict[str, Any]]:
        """What the events that have not been read came to; leaving the stream makes Gradio forget the others."""
        found = []
        with self.http.stream("GET", "/gradio_api/queue/data", params={"session_hash": self.session}) as response:
            for line in response.iter_lines():
                if '"process_completed"' in line:
                    found.append(dict(json.loads(line[5:])["output"]))
                if len(found) == count:
                    return found
        raise AssertionError(f"{len(found)} of {count} events ended")

    def number_of(self, name: str) -> int:
        return next(int(one["id"]) for one in self.dependencies() if one["api_name"] == name)


def file_object(path: str, **fields: object) -> dict[str, Any]:
    return {"path": path, "meta": {"_type": "gradio.FileData"}, **fields}


def chat_with(*parts: object) -> list[dict[str, Any]]:
    """A chat of one question in the chatbot's form."""
    return [{"role": "user", "metadata": None, "options": None, "content": list(parts)}]


def image_part(path: str, **fields: object) -> dict[str, Any]:
    return {"type": "file", "file": file_object(path, **fields)}
