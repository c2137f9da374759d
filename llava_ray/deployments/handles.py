"""The gateway over Ray Serve: a handle to each model's deployment."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Mapping
from typing import Any

from prometheus_client.core import Metric
from ray.exceptions import RayActorError, RayError, TaskCancelledError
from ray.serve.exceptions import DeploymentUnavailableError, RequestCancelledError
from ray.serve.handle import DeploymentHandle

from llava_ray.deployments.gateway import find_served_model, unwrapped
from llava_ray.deployments.messages import Task
from llava_ray.deployments.refusal import RefusalError, Refused, refuse
from llava_ray.deployments.replica import AnswerPiece
from llava_ray.deployments.settings import ModelSource, ServeSettings
from llava_ray.generate.engine import ModelCard

_log = logging.getLogger(__name__)

_ATTEMPTS = 3  # replicas that a task is tried on, until the first piece of its answer has been sent
_CARD_TIMEOUT_S = 10.0
_PING_TIMEOUT_S = 3.0
_SILENCE_S = 20.0  # without a piece or a heartbeat, which come every merging._BEAT_S

_LOST = Refused(503, "the replica that generated this answer was lost; try again", "replica_lost", retry_after_s=1)


class ServeGateway:
    """The gateway in an ingress replica."""

    def __init__(self, handles: Mapping[ModelSource, DeploymentHandle], settings: ServeSettings) -> None:
        """Initialise with one handle per model."""
        self.handles = dict(handles)
        self.settings = settings
        self.cards: dict[ModelSource, ModelCard] = {}

    @property
    def sources(self) -> tuple[ModelSource, ...]:
        """Return the models."""
        return tuple(self.handles)

    async def run(self, task: Task, session: str) -> AsyncGenerator[list[AnswerPiece], None]:
        """Stream an answer, retrying on another replica if the first is full or dies before its first piece.

        Raises RefusalError.
        """
        handle = self.handles[find_served_model(self.sources, task.model)]
        # A model scaled to zero may take minutes to load: no timeout then.
        timeout_s = _SILENCE_S if self.settings.min_replicas else None
        for attempt in range(_ATTEMPTS):
            last = attempt == _ATTEMPTS - 1
            started = False
            try:
                # Retries ignore the session, whose replica is full or dead. By value: over gRPC, not as Ray objects.
                method = handle.options(stream=True, session_id="" if attempt else session, _by_reference=False)
                async for pieces in _called(method, task, timeout_s):
                    started = True
                    yield pieces
            except RefusalError as error:
                elsewhere = error.refused.code == "queue_full" and self.settings.max_replicas > 1
                if started or last or not elsewhere:
                    raise
            except (RayActorError, TimeoutError) as error:
                _log.warning("request %s lost its replica: %s", task.request_id, type(error).__name__)
                if started or last:
                    raise RefusalError(_LOST) from error
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


async def _called(
    handle: DeploymentHandle, task: Task, timeout_s: float | None
) -> AsyncGenerator[list[AnswerPiece], None]:
    """Call a replica's ``run``; leaving the iterator early cancels it there.

    Raises RefusalError, TimeoutError for a replica without heartbeats (or without a first item within ``timeout_s``
    seconds), and Ray's own errors.
    """
    response = handle.run.remote(task)
    items = aiter(response)
    ended = False
    try:
        while True:
            async with asyncio.timeout(timeout_s):
                item: Refused | list[AnswerPiece] | None = await anext(items)
            timeout_s = _SILENCE_S
            if item is not None:
                yield unwrapped(item)
    except StopAsyncIteration:
        ended = True
    except (DeploymentUnavailableError, RequestCancelledError, TaskCancelledError) as error:
        ended = True
        raise RefusalError(_LOST) from error
    finally:
        if not ended:
            response.cancel()


async def collect_metrics(handle: DeploymentHandle) -> dict[str, list[Metric]]:
    """Return the metrics of each replica of a deployment by its id, without those that do not answer."""
    try:
        async with asyncio.timeout(_PING_TIMEOUT_S):
            answers: list[Any] = await handle.broadcast("collect").results_async(return_exceptions=True)
    except (TimeoutError, RayError, DeploymentUnavailableError):
        return {}
    return dict(answer for answer in answers if not isinstance(answer, BaseException))
