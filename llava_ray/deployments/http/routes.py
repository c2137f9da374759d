"""The HTTP API, OpenAI's: chats, completions, models; and health, readiness and metrics."""

import asyncio
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client.core import Metric
from starlette.exceptions import HTTPException

from llava_ray.deployments.gateway import Gateway, find_served_model
from llava_ray.deployments.http.adapter_routes import add_adapter_routes
from llava_ray.deployments.http.answering import EventStream, StreamedAnswer, refused_response
from llava_ray.deployments.http.auth import ApiKey, Guard
from llava_ray.deployments.http.closed_model import ClosedModel
from llava_ray.deployments.http.limits import HeldAmounts
from llava_ray.deployments.http.reading_routes import add_reading_routes
from llava_ray.deployments.http.responses import ChatForm, CompletionForm, find_system_fingerprint
from llava_ray.deployments.http.responses_api.route import add_responses
from llava_ray.deployments.http.schema import ChatRequest, CompletionRequest, GenerationFields, read_request
from llava_ray.deployments.http.session_keys import find_session, hash_session
from llava_ray.deployments.messages import Task, chat_task, completion_task
from llava_ray.deployments.metrics import IngressMetrics, render_metrics
from llava_ray.deployments.model_source import ModelSource
from llava_ray.deployments.refusal import RefusalError, Refused, refuse
from llava_ray.deployments.replica import AnswerPiece
from llava_ray.deployments.settings import ServeSettings

SESSION_HEADER = "x-session-id"
_LONG_BODY = 256 * 1024  # bytes; parsing fewer takes less than a millisecond

R = TypeVar("R", bound=ClosedModel)


@dataclass
class Front:
    """The shared state of one ingress process's routes."""

    gateway: Gateway
    settings: ServeSettings
    keys: Sequence[ApiKey] = ()
    metrics: IngressMetrics = field(default_factory=IngressMetrics)
    collect: Callable[[], Awaitable[dict[str, list[Metric]]]] | None = None
    """Collects the metrics of all processes; by default those of the gateway and of this one."""

    def __post_init__(self) -> None:
        """Create the guard and the limits."""
        settings = self.settings
        self.guard = Guard(self.keys, settings.requests_per_minute)
        self.open_requests = HeldAmounts(settings.max_open_requests, settings.max_open_requests_per_address)
        self.page_streams = HeldAmounts(settings.max_page_streams, settings.max_page_streams_per_address)
        self.bytes_in_flight = HeldAmounts(
            max(settings.max_bytes_in_flight, settings.max_body_bytes),
            max(settings.max_bytes_in_flight_per_key, settings.max_body_bytes),
        )
        names = [source.name for source in self.gateway.sources]
        self.metrics.set_replicas(names, settings.min_replicas, settings.max_replicas)

    def count_refused(self, refused: Refused) -> None:
        """Count a refusal in the metrics."""
        self.metrics.refused.labels(refused.code).inc()

    async def read(self, kind: type[R], request: Request) -> R:
        """Parse a request; a long one in a thread, so that it does not block other streams. Raises RefusalError."""
        body = await request.body()
        if len(body) < _LONG_BODY:
            return read_request(kind, body)
        return await asyncio.to_thread(read_request, kind, body)

    async def chat(self, request: Request) -> Response:
        """Respond to a chat request."""
        body = await self.read(ChatRequest, request)
        task = await self.located(chat_task(body, f"chatcmpl-{uuid.uuid4().hex}", self.settings))
        form = ChatForm(task.request_id, task.model, body.logprobs)
        return self.respond(body, task, form, request)

    def checked(self, body: ChatRequest) -> Task:
        """Check a chat from the API or the page and return its task. Raises RefusalError."""
        task = chat_task(body, f"chatcmpl-{uuid.uuid4().hex}", self.settings)
        find_served_model(self.gateway.sources, task.model)
        return task

    async def complete(self, request: Request) -> Response:
        """Respond to a completion request."""
        body = await self.read(CompletionRequest, request)
        task = await self.located(completion_task(body, f"cmpl-{uuid.uuid4().hex}", self.settings))
        form = CompletionForm(task.request_id, task.model, body.logprobs is not None)
        return self.respond(body, task, form, request)

    async def located(self, task: Task) -> Task:
        """Return a task with the adapter that it names, if that was loaded while the service runs.

        Raises RefusalError (404) for a name that nothing has.
        """
        if any(task.model in source.names for source in self.gateway.sources):
            return task
        adapter = await self.gateway.adapters.find(task.model)
        if adapter is None:
            find_served_model(self.gateway.sources, task.model)
        return replace(task, adapter=adapter)

    def respond(self, body: GenerationFields, task: Task, form: ChatForm, request: Request) -> Response:
        """Return the response that runs a task, whole or as a stream."""
        pieces, count = self.start(task, request)
        if body.stream:
            return EventStream(pieces, form, task.num_choices, count, with_usage=body.include_usage)
        return StreamedAnswer(pieces, form, task.num_choices, count)

    def start(
        self, task: Task, request: Request, *, session: str | None = None
    ) -> tuple[AsyncGenerator[list[AnswerPiece], None], Callable[[int], None]]:
        """Return the pieces of a task's answer, and what counts its status in the end.

        Without a ``session`` in the header or here, its first texts stand for it.
        """
        route = str(request.scope["path"])  # request.url is built from the Host header, which may be anything

        def count(status: int) -> None:
            self.metrics.responses.labels(route, str(status)).inc()

        named = request.headers.get(SESSION_HEADER) or session
        return self.gateway.run(task, hash_session(named) if named else find_session(task)), count

    async def on_refusal(self, request: Request, error: Exception) -> Response:
        """Count a refusal and respond with it."""
        assert isinstance(error, RefusalError)
        del request
        self.count_refused(error.refused)
        return refused_response(error.refused)

    async def on_http_error(self, request: Request, error: Exception) -> Response:
        """Convert the framework's own errors (no such path, wrong method) to OpenAI's form."""
        assert isinstance(error, HTTPException)
        code = {404: "unknown_path", 405: "method_not_allowed"}.get(error.status_code, "http_error")
        refused = Refused(error.status_code, f"{_place_of(request)}: {error.detail}", code)
        response = await self.on_refusal(request, RefusalError(refused))
        response.headers.update(error.headers or {})
        return response

    async def on_unhandled_error(self, request: Request, error: Exception) -> Response:
        """Respond 500; the cause is in the log."""
        del error
        refused = Refused(500, "internal server error; see the service's log", "internal_error")
        return await self.on_refusal(request, RefusalError(refused))

    async def models(self) -> dict[str, Any]:
        """List the models and adapters with their capabilities."""
        return {
            "object": "list",
            "data": [one for source in self.gateway.sources for one in await self.describe(source)],
        }

    async def one_model(self, name: str) -> dict[str, Any]:
        """Describe one model."""
        adapter = await self.gateway.adapters.find(name)
        source = find_served_model(self.gateway.sources, name if adapter is None else adapter.base)
        return next(one for one in await self.describe(source) if one["id"] == name)

    async def describe(self, source: ModelSource) -> list[dict[str, Any]]:
        """Describe a model and its adapters. Raises RefusalError (503) if it has not been loaded yet."""
        card = await self.gateway.card(source)
        loaded = [one.name for one in await self.gateway.adapters.list_all() if one.base == source.name]
        return [
            {
                "id": name,
                "object": "model",
                "created": 0,
                "owned_by": "llava_ray",
                "root": source.name,
                "parent": None if name == source.name else source.name,
                "max_model_len": card.max_model_len,
                "capabilities": {
                    "vision": card.vision,
                    "max_images": self.settings.max_images if card.vision else 0,
                    "chat": True,
                    "completions": True,
                    "streaming": True,
                    "logprobs": True,
                    "tools": name in card.tool_formats,
                    "structured_output": card.holds_constraints,
                },
                "template": card.template,
            }
            for name in (*source.names, *loaded)
        ]

    async def ready(self) -> Response:
        """Respond whether each model can take a request."""
        models = await self.gateway.ready()
        return JSONResponse({"ready": all(models.values()), "models": models}, 200 if all(models.values()) else 503)

    async def counts(self) -> Response:
        """Respond with the metrics of all processes."""
        if self.collect is None:
            parts = {**await self.gateway.collect(), "ingress": self.metrics.collect()}
        else:
            parts = await self.collect()
        return Response(render_metrics(parts), media_type="text/plain; version=0.0.4; charset=utf-8")


def add_api(app: FastAPI, front: Front) -> None:
    """Add the routes of the API."""
    app.add_api_route("/v1/chat/completions", front.chat, methods=["POST"], response_model=None)
    app.add_api_route("/v1/completions", front.complete, methods=["POST"], response_model=None)
    app.add_api_route("/v1/models", front.models, methods=["GET"])
    app.add_api_route("/v1/models/{name:path}", front.one_model, methods=["GET"])
    add_responses(app, front)
    add_reading_routes(app, front)
    add_adapter_routes(app, front.gateway, front.settings)
    app.add_api_route("/metrics", front.counts, methods=["GET"], response_model=None)
    # The page, mounted at the root, would otherwise handle unknown API paths.
    app.add_api_route("/v1/{path:path}", unknown_path, methods=["GET", "POST", "PUT", "DELETE"], response_model=None)


def add_health(app: FastAPI, front: Front) -> None:
    """Add the routes of load balancers, without a key."""
    app.add_api_route("/health", _health, methods=["GET"])
    app.add_api_route("/ready", front.ready, methods=["GET"], response_model=None)
    app.add_api_route("/version", _version, methods=["GET"])


async def _health() -> dict[str, str]:
    """Respond that this process is alive."""
    return {"status": "ok"}


async def unknown_path(request: Request) -> None:
    """Respond 404 in OpenAI's form."""
    raise refuse(404, f"no {_place_of(request)} here", "unknown_path")


def _place_of(request: Request) -> str:
    """Return a request's method and path, truncated and escaped for a message."""
    return f"{request.method[:20]} {str(request.scope['path'])[:200]!r}"


async def _version() -> dict[str, str]:
    """Respond with the version."""
    return {"version": find_system_fingerprint()}
