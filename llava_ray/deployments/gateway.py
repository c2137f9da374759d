"""The gateway from a front to the replicas of its models, in this process or on a cluster."""

import asyncio
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Protocol

from prometheus_client.core import Metric

from llava_ray.deployments.adapters.places import AdapterRef
from llava_ray.deployments.adapters.registry import LocalRegistry
from llava_ray.deployments.adapters.service import AdapterService
from llava_ray.deployments.messages import Task
from llava_ray.deployments.model_source import ModelSource
from llava_ray.deployments.refusal import RefusalError, Refused, refuse
from llava_ray.deployments.replica import AnswerPiece, Replica
from llava_ray.generate.engine import ModelCard


class Gateway(Protocol):
    """The models of one application."""

    @property
    def sources(self) -> tuple[ModelSource, ...]:
        """Return the models in display order."""
        ...

    @property
    def adapters(self) -> AdapterService:
        """Return the adapters that are loaded while the service runs."""
        ...

    def run(self, task: Task, session: str) -> AsyncGenerator[list[AnswerPiece], None]:
        """Stream an answer; tasks of one session go to one replica while it has capacity.

        Leaving the iterator early cancels the task. Raises RefusalError, also in mid-stream.
        """
        ...

    async def card(self, source: ModelSource) -> ModelCard:
        """Return a model's capabilities. Raises RefusalError (503) if it is not available in time."""
        ...

    async def ready(self) -> dict[str, bool]:
        """Return whether each model can take a request now."""
        ...

    async def collect(self) -> dict[str, list[Metric]]:
        """Return the metrics of each running process."""
        ...


class LocalGateway:
    """Replicas in this process: for tests, notebooks and an app without Serve."""

    def __init__(self, replicas: Mapping[ModelSource, Replica]) -> None:
        """Initialise with one replica per model."""
        self.replicas = dict(replicas)
        calls = {source.name: LocalCalls(replica) for source, replica in self.replicas.items()}
        settings = next(iter(self.replicas.values())).settings
        self.adapters = AdapterService(settings, LocalRegistry(), calls)

    @property
    def sources(self) -> tuple[ModelSource, ...]:
        """Return the models."""
        return tuple(self.replicas)

    async def run(self, task: Task, session: str) -> AsyncGenerator[list[AnswerPiece], None]:
        """Stream an answer. Raises RefusalError."""
        del session
        source = find_model_of(self.sources, task)
        async with aclosing(self.replicas[source].run(task)) as items:
            async for item in items:
                yield unwrapped(item)

    async def card(self, source: ModelSource) -> ModelCard:
        """Return a model's capabilities."""
        return self.replicas[source].card()

    async def ready(self) -> dict[str, bool]:
        """Return whether each model's engine is alive."""
        await asyncio.sleep(0)
        return {source.name: True for source in self.sources}

    async def collect(self) -> dict[str, list[Metric]]:
        """Return the metrics of each replica."""
        return {source.name: replica.collect() for source, replica in self.replicas.items()}


class LocalCalls:
    """Calls to the only replica of a model, in this process."""

    def __init__(self, replica: Replica) -> None:
        """Initialise for a replica."""
        self.replica = replica

    async def load(self, adapter: AdapterRef) -> None:
        """Load an adapter. Raises RefusalError."""
        refused = await self.replica.load_adapter(adapter)
        if refused is not None:
            raise RefusalError(refused)

    async def load_everywhere(self, adapter: AdapterRef) -> None:
        """Do nothing: there is no other replica."""

    async def count_users(self, adapter: AdapterRef) -> int:
        """Return the number of requests that use an adapter."""
        return self.replica.adapters.users[adapter.revision]

    async def drop(self, adapter: AdapterRef) -> None:
        """Remove an adapter, when its last request has ended."""
        await self.replica.adapters.drop(adapter)


def find_model_of(sources: tuple[ModelSource, ...], task: Task) -> ModelSource:
    """Return the model of a task. Raises RefusalError (404)."""
    return find_served_model(sources, task.model if task.adapter is None else task.adapter.base)


def find_served_model(sources: tuple[ModelSource, ...], name: str) -> ModelSource:
    """Return the model with this name. Raises RefusalError (404)."""
    for source in sources:
        if name in source.names:
            return source
    offered = ", ".join(name for source in sources for name in source.names)
    raise refuse(404, f"there is no model {name[:100]!r}; available: {offered}", "model_not_found", "model")


def unwrapped(item: Refused | list[AnswerPiece]) -> list[AnswerPiece]:
    """Return the pieces. Raises RefusalError for a refusal."""
    if isinstance(item, Refused):
        raise RefusalError(item)
    return item
