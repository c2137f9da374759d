"""The methods of a model's deployment that ingresses call for answers."""

from collections.abc import AsyncGenerator
from contextlib import aclosing

from llava_ray.deployments.bundles import BundleCall, BundledItem, ReplicaBundles, StreamMessage, StreamPlace
from llava_ray.deployments.merging import with_heartbeats
from llava_ray.deployments.messages import Task
from llava_ray.deployments.replica import Replica


class StreamMethods:
    """A part of a deployment with a replica."""

    replica: Replica
    bundles: ReplicaBundles

    async def run(self, task: Task, place: StreamPlace) -> AsyncGenerator[StreamMessage, None]:
        """Stream an answer with heartbeats: without them a stopped process would not be noticed."""
        stream = with_heartbeats(self.replica.run(task))
        async with aclosing(self.bundles.send(place, stream, may_bundle=task.stream)) as messages:
            async for message in messages:
                yield message

    async def carry(self, call: BundleCall) -> AsyncGenerator[list[tuple[int, BundledItem]], None]:
        """Carry the streams of an ingress, bundled."""
        async with aclosing(self.bundles.carry(call)) as bundles:
            async for bundle in bundles:
                yield bundle
