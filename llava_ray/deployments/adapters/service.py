"""Loading and unloading of adapters in all replicas of a service."""

import asyncio
import uuid
from collections.abc import Mapping
from typing import Protocol

from llava_ray.deployments.adapters.places import AdapterRef, check_place
from llava_ray.deployments.adapters.registry import AdapterRegistry
from llava_ray.deployments.refusal import refuse
from llava_ray.deployments.settings import ServeSettings

_NAME = "lora_name"


class ReplicaCalls(Protocol):
    """Calls to the replicas of one model."""

    async def load(self, adapter: AdapterRef) -> None:
        """Load an adapter in one replica at least. Raises RefusalError if it cannot be served."""
        ...

    async def load_everywhere(self, adapter: AdapterRef) -> None:
        """Load an adapter in the other replicas; one that fails loads it with its first request."""
        ...

    async def count_users(self, adapter: AdapterRef) -> int:
        """Return the number of requests that use an adapter."""
        ...

    async def drop(self, adapter: AdapterRef) -> None:
        """Remove an adapter from all replicas, when its last request has ended."""
        ...


class AdapterService:
    """The adapters that were loaded while the service runs."""

    def __init__(
        self, settings: ServeSettings, registry: AdapterRegistry, replicas: Mapping[str, ReplicaCalls]
    ) -> None:
        """Initialise with the calls to each model's replicas, by its name."""
        self.settings = settings
        self.registry = registry
        self.replicas = replicas
        self._one_at_a_time = asyncio.Lock()

    async def find(self, name: str) -> AdapterRef | None:
        """Return a loaded adapter, None for an unknown name. Raises RefusalError."""
        return await self.registry.find(name) if self.settings.loads_adapters else None

    async def list_all(self) -> list[AdapterRef]:
        """Return the loaded adapters, by name. Raises RefusalError."""
        return await self.registry.list_all() if self.settings.loads_adapters else []

    async def load(self, name: str, place: str, base: str | None, *, replacing: bool) -> None:
        """Load an adapter in all replicas, and add it to those that requests may name. Raises RefusalError.

        With ``replacing`` it may take the name of another one, whose running requests end as they began.
        """
        base = self._check_names(name, base)
        check_place(place)
        adapter = AdapterRef(name, place, base, uuid.uuid4().hex)
        async with self._one_at_a_time:
            old = await self.registry.find(name)
            if old is not None and not replacing:
                raise _already_loaded(name)
            if old is None and len(await self.registry.list_all()) >= self.settings.max_adapters:
                raise refuse(
                    400,
                    f"{_NAME}: {self.settings.max_adapters} adapters are loaded (max_adapters); unload one first",
                    "too_many_adapters",
                    _NAME,
                )
            await self.replicas[base].load(adapter)
            if not await self.registry.add(adapter, replacing=replacing):  # through another ingress meanwhile
                await self.replicas[base].drop(adapter)
                raise _already_loaded(name)
            await self.replicas[base].load_everywhere(adapter)
            if old is not None:
                await self.replicas[old.base].drop(old)

    async def unload(self, name: str) -> None:
        """Remove an adapter from all replicas. Raises RefusalError: 409 while requests use it, 404 for another name."""
        async with self._one_at_a_time:
            adapter = await self.registry.find(name)
            if adapter is None:
                of_start = any(name in source.names for source in self.settings.sources)
                words = "is part of the service's settings and stays" if of_start else "cannot be found"
                raise refuse(404, f"{_NAME}: the lora adapter {name[:100]!r} {words}", "adapter_not_found", _NAME)
            num_users = await self.replicas[adapter.base].count_users(adapter)
            if num_users:
                raise refuse(
                    409,
                    f"{_NAME}: {num_users} requests use the adapter {name!r}; unload it when they have ended",
                    "adapter_in_use",
                    _NAME,
                )
            await self.registry.remove(name)
            await self.replicas[adapter.base].drop(adapter)

    def _check_names(self, name: str, base: str | None) -> str:
        """Return the model to serve an adapter over, by default the first. Raises RefusalError."""
        sources = self.settings.sources
        if any(name in source.names for source in sources):
            raise refuse(
                400, f"{_NAME}: {name!r} is a model of the service's settings; choose another", "name_taken", _NAME
            )
        models = [source.name for source in sources]
        if base is not None and base not in models:
            words = f"base_model_name: there is no model {base[:100]!r}; available: {', '.join(models)}"
            raise refuse(404, words, "model_not_found", "base_model_name")
        return base or models[0]


def _already_loaded(name: str) -> Exception:
    """Return vLLM's refusal of a name that is taken."""
    return refuse(
        400,
        f"{_NAME}: the lora adapter {name!r} has already been loaded; unload it first, or replace it with "
        "load_inplace = true",
        "already_loaded",
        _NAME,
    )
