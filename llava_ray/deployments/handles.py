"""The gateway over Ray Serve: a handle to each model's deployment."""

import asyncio
import logging
import uuid
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any

from prometheus_client.core import Metric
from ray.exceptions import RayActorError, RayError
from ray.serve.exceptions import DeploymentUnavailableError, RequestCancelledError
from ray.serve.handle import DeploymentHandle

from llava_ray.deployments.adapters.places import AdapterRef
from llava_ray.deployments.adapters.registry import ClusterRegistry
from llava_ray.deployments.adapters.service import AdapterService
from llava_ray.deployments.bundle_reading import SILENCE_S, StreamCalls
from llava_ray.deployments.bundles import LOST
from llava_ray.deployments.gateway import find_model_of
from llava_ray.deployments.messages import Task
from llava_ray.deployments.model_source import ModelSource
from llava_ray.deployments.refusal import RefusalError, Refused, refuse
from llava_ray.deployments.replica import AnswerPiece
from llava_ray.deployments.settings import ServeSettings
from llava_ray.generate.engine import ModelCard

_log = logging.getLogger(__name__)

_ATTEMPTS = 3  # replicas that a task is tried on, until the first piece of its answer has been sent
_CARD_TIMEOUT_S = 10.0
_PING_TIMEOUT_S = 3.0
_LOADING_S = 300.0  # for loading an adapter, or the model first where it is scaled to zero


class ServeGateway:
    """The gateway in an ingress replica."""

    def __init__(
        self, handles: Mapping[ModelSource, DeploymentHandle], settings: ServeSettings, service_id: str = ""
    ) -> None:
        """Initialise with one handle per model; ``service_id`` is that of all ingresses of one service."""
        self.handles = dict(handles)
        self.settings = settings
        calls = {source.name: HandleCalls(handle, settings) for source, handle in self.handles.items()}
        self.adapters = AdapterService(settings, ClusterRegistry(service_id), calls)
        self.cards: dict[ModelSource, ModelCard] = {}
        process_id = uuid.uuid4().hex
        self.streams = {source: StreamCalls(handle, process_id) for source, handle in self.handles.items()}

    @property
    def sources(self) -> tuple[ModelSource, ...]:
        """Return the models."""
        return tuple(self.handles)

    async def run(self, task: Task, session: str) -> AsyncGenerator[list[AnswerPiece], None]:
        """Stream an answer, retrying on another replica if the first is full or dies before its first piece.

        Raises RefusalError.
        """
        calls = self.streams[find_model_of(self.sources, task)]
        # A model scaled to zero may take minutes to load: no timeout then.
        timeout_s = SILENCE_S if self.settings.min_replicas else None
        for attempt in range(_ATTEMPTS):
            last = attempt == _ATTEMPTS - 1
            started = False
            try:
                # Retries ignore the session, whose replica is full or dead.
                async with aclosing(calls.call(task, "" if attempt else session, timeout_s)) as answer:
                    async for pieces in answer:
                        started = True
                        yield pieces
            except RefusalError as error:
                elsewhere = error.refused.code == "queue_full" and self.settings.max_replicas > 1
                if started or last or not elsewhere:
                    raise
            except (RayActorError, TimeoutError) as error:
                _log.warning("request %s lost its replica: %s", task.request_id, type(error).__name__)
                if started or last:
                    raise RefusalError(LOST) from error
            else:
                return

    async def card(self, source: ModelSource) -> ModelCard:
        """Return a model's capabilities, cached after the first call. Raises RefusalError."""
        if source not in self.cards:
            try:
                async with asyncio.timeout(_CARD_TIMEOUT_S):
                    self.cards[source] = await self.handles[source].card.remote()
            except (TimeoutError, RayError, DeploymentUnavailableError):
                raise refuse(
                    503, f"model {source.name!r} is not available yet; try again", "model_unavailable"
                ) from None
        return self.cards[source]

    async def ready(self) -> dict[str, bool]:
        """Return whether one replica of each model answers; do not wake models scaled to zero."""
        answers = await asyncio.gather(*(self.answers(source) for source in self.sources))
        return {source.name: answer for source, answer in zip(self.sources, answers, strict=True)}

    async def answers(self, source: ModelSource) -> bool:
        """Return whether a model has a replica that answers."""
        if self.settings.min_replicas == 0 and source in self.cards:
            return True
        try:
            async with asyncio.timeout(_PING_TIMEOUT_S):
                await self.handles[source].card.remote()
        except (TimeoutError, RayError, DeploymentUnavailableError):
            return False
        return True

    async def collect(self) -> dict[str, list[Metric]]:
        """Return the metrics of every replica of every model."""
        answers = await asyncio.gather(*(collect_metrics(handle) for handle in self.handles.values()))
        return {name: metrics for answer in answers for name, metrics in answer.items()}


class HandleCalls:
    """Calls to all replicas of a model about its adapters."""

    def __init__(self, handle: DeploymentHandle, settings: ServeSettings) -> None:
        """Initialise for a model's handle."""
        self.handle = handle
        # For the download and the loading; a model scaled to zero is loaded first, which may take minutes.
        self.timeout_s = settings.adapter_timeout_s + _LOADING_S

    async def load(self, adapter: AdapterRef) -> None:
        """Load an adapter in one replica. Raises RefusalError."""
        try:
            async with asyncio.timeout(self.timeout_s):
                refused: Refused | None = await self.handle.load_adapter.remote(adapter)
        except (TimeoutError, RayError, DeploymentUnavailableError, RequestCancelledError):
            raise refuse(503, "no replica could load the adapter; try again", "replica_lost") from None
        if refused is not None:
            raise RefusalError(refused)

    async def load_everywhere(self, adapter: AdapterRef) -> None:
        """Load an adapter in all replicas; one that fails loads it with its first request."""
        answers = await self.broadcast("load_adapter", adapter, timeout_s=self.timeout_s)
        for answer in answers:
            if answer is not None:
                _log.warning("a replica has not loaded the adapter %s: %s", adapter.name, answer)

    async def count_users(self, adapter: AdapterRef) -> int:
        """Return the number of requests that use an adapter, in the replicas that answer."""
        answers = await self.broadcast("count_adapter_users", adapter, timeout_s=_PING_TIMEOUT_S)
        return sum(answer for answer in answers if isinstance(answer, int))

    async def drop(self, adapter: AdapterRef) -> None:
        """Remove an adapter from all replicas, when its last request has ended."""
        await self.broadcast("drop_adapter", adapter, timeout_s=_PING_TIMEOUT_S)

    async def broadcast(self, method: str, adapter: AdapterRef, *, timeout_s: float) -> list[Any]:
        """Call a method of all replicas; exceptions are among the answers."""
        try:
            async with asyncio.timeout(timeout_s):
                answers: list[Any] = await self.handle.broadcast(method, adapter).results_async(return_exceptions=True)
        except (TimeoutError, RayError, DeploymentUnavailableError) as error:
            return [error]
        return answers


async def collect_metrics(handle: DeploymentHandle) -> dict[str, list[Metric]]:
    """Return the metrics of each replica of a deployment by its id, without those that do not answer."""
    try:
        async with asyncio.timeout(_PING_TIMEOUT_S):
            answers: list[Any] = await handle.broadcast("collect").results_async(return_exceptions=True)
    except (TimeoutError, RayError, DeploymentUnavailableError):
        return {}
    return dict(answer for answer in answers if not isinstance(answer, BaseException))
