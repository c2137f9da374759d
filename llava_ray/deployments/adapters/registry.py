"""The adapters that a service knows: one table for all of its ingresses and replicas."""

import asyncio
import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Protocol

from llava_ray.deployments.adapters.places import AdapterRef
from llava_ray.deployments.refusal import refuse

_NAMESPACE = b"llava_ray_adapters"
_TIMEOUT_S = 5.0


class AdapterRegistry(Protocol):
    """A table of adapters by name. Errors: RefusalError (503) while it does not answer."""

    async def find(self, name: str) -> AdapterRef | None:
        """Return an adapter, None for an unknown name."""
        ...

    async def list_all(self) -> list[AdapterRef]:
        """Return all adapters, by name."""
        ...

    async def add(self, adapter: AdapterRef, *, replacing: bool) -> bool:
        """Add an adapter; return False, without adding it, if there is one of its name and not ``replacing``."""
        ...

    async def remove(self, name: str) -> None:
        """Remove an adapter, if it is there."""
        ...


class LocalRegistry:
    """The table of a service in one process."""

    def __init__(self) -> None:
        """Initialise an empty table."""
        self.adapters: dict[str, AdapterRef] = {}

    async def find(self, name: str) -> AdapterRef | None:
        """Return an adapter, None for an unknown name."""
        return self.adapters.get(name)

    async def list_all(self) -> list[AdapterRef]:
        """Return all adapters, by name."""
        return [self.adapters[name] for name in sorted(self.adapters)]

    async def add(self, adapter: AdapterRef, *, replacing: bool) -> bool:
        """Add an adapter; return False, without adding it, if there is one of its name and not ``replacing``."""
        if adapter.name in self.adapters and not replacing:
            return False
        self.adapters[adapter.name] = adapter
        return True

    async def remove(self, name: str) -> None:
        """Remove an adapter, if it is there."""
        self.adapters.pop(name, None)


class ClusterRegistry:
    """The table in the key-value store of Ray's head, where Serve keeps its own state.

    It outlives every ingress and replica, and knows the adapters of a model that is scaled to zero.
    """

    def __init__(self, service: str) -> None:
        """Initialise for the service with this unique id."""
        self.prefix = f"{service}/"

    async def find(self, name: str) -> AdapterRef | None:
        """Return an adapter, None for an unknown name. Raises RefusalError."""
        return await self._called(self._read, self.prefix + name)

    async def list_all(self) -> list[AdapterRef]:
        """Return all adapters, by name. Raises RefusalError."""
        return await self._called(self._read_all)

    async def add(self, adapter: AdapterRef, *, replacing: bool) -> bool:
        """Add an adapter; return False, without adding it, if there is one of its name and not ``replacing``."""
        return await self._called(self._write, adapter, replacing)

    async def remove(self, name: str) -> None:
        """Remove an adapter, if it is there. Raises RefusalError."""
        await self._called(self._delete, self.prefix + name)

    async def _called(self, function, *arguments):  # type: ignore[no-untyped-def]
        """Call the store in a thread: its client blocks. Raises RefusalError."""
        from ray.exceptions import RayError

        try:
            async with asyncio.timeout(_TIMEOUT_S):
                return await asyncio.to_thread(function, *arguments)
        except (TimeoutError, RayError, OSError):
            raise refuse(503, "the cluster's table of adapters does not answer; try again", "registry_lost") from None

    def _read(self, key: str) -> AdapterRef | None:
        from ray.experimental import internal_kv

        value = internal_kv._internal_kv_get(key, namespace=_NAMESPACE)
        return None if value is None else parse_adapter(json.loads(value))

    def _read_all(self) -> list[AdapterRef]:
        from ray.experimental import internal_kv

        keys = internal_kv._internal_kv_list(self.prefix, namespace=_NAMESPACE)
        found = [self._read(bytes(key).decode()) for key in sorted(keys)]
        return [adapter for adapter in found if adapter is not None]

    def _write(self, adapter: AdapterRef, replacing: bool) -> bool:
        from ray.experimental import internal_kv

        value = json.dumps(asdict(adapter))
        was_there = internal_kv._internal_kv_put(
            self.prefix + adapter.name, value, overwrite=replacing, namespace=_NAMESPACE
        )
        return replacing or not was_there

    def _delete(self, key: str) -> None:
        from ray.experimental import internal_kv

        internal_kv._internal_kv_del(key, namespace=_NAMESPACE)


def parse_adapter(values: Mapping[str, str]) -> AdapterRef:
    """Convert a stored entry to an adapter."""
    return AdapterRef(values["name"], values["place"], values["base"], values["revision"])
