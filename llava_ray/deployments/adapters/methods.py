"""The methods of a model's deployment that ingresses call about adapters."""

from llava_ray.deployments.adapters.places import AdapterRef
from llava_ray.deployments.refusal import Refused
from llava_ray.deployments.replica import Replica


class AdapterMethods:
    """A part of a deployment with a replica."""

    replica: Replica

    async def load_adapter(self, adapter: AdapterRef) -> Refused | None:
        """Load an adapter; return a refusal if it cannot be served."""
        return await self.replica.load_adapter(adapter)

    async def count_adapter_users(self, adapter: AdapterRef) -> int:
        """Return the number of requests that use an adapter."""
        return self.replica.adapters.users[adapter.revision]

    async def drop_adapter(self, adapter: AdapterRef) -> None:
        """Remove an adapter, when its last request has ended."""
        await self.replica.adapters.drop(adapter)
