"""One message a step for all streams between a replica and an ingress, instead of one a stream.

Every stream is a call of its own, which Serve routes, counts and cancels. While an ingress has several at one replica
it also keeps one call open that only carries: the pieces of all its streams, bundled. Answers that are sent whole use
their own call.
"""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass

from llava_ray.deployments.merging import BEAT_S
from llava_ray.deployments.refusal import Refused
from llava_ray.deployments.replica import AnswerPiece

BundledItem = Refused | list[AnswerPiece]

GATHER_S = 0.005  # the longest delay of a piece, for the others of the same step
_IDLE_S = 1.0  # a call without streams ends after so long: Serve counts it as a request

LOST = Refused(503, "the replica that generated this answer was lost; try again", "replica_lost", retry_after_s=1)


@dataclass(frozen=True)
class StreamPlace:
    """The ingress of a stream, and the stream's number there."""

    ingress_id: str
    number: int


@dataclass(frozen=True)
class BundleCall:
    """A call that carries all streams between one ingress and one replica."""

    ingress_id: str
    replica_id: str


@dataclass(frozen=True)
class StreamStart:
    """The first message of a stream's own call; another says that all later items come in bundles."""

    replica_id: str
    is_bundled: bool


@dataclass(frozen=True)
class StreamEnd:
    """The last message of a stream's own call, with the number of its items there and in bundles."""

    num_items: int


StreamMessage = BundledItem | StreamStart | StreamEnd | None  # None is a heartbeat


class _Bundle:
    """The items of one ingress's streams that have not been sent; while the ingress is slow it grows by text only."""

    def __init__(self) -> None:
        self.items: list[tuple[int, BundledItem]] = []
        self.changed = asyncio.Event()
        self.num_streams = 0
        self.is_open = True

    def add(self, number: int, item: BundledItem) -> None:
        self.items.append((number, item))
        self.changed.set()

    def take(self) -> list[tuple[int, BundledItem]]:
        items, self.items = self.items, []
        self.changed.clear()
        return items


class ReplicaBundles:
    """The bundles of one replica, one for each ingress with a call that carries."""

    def __init__(self, replica_id: str) -> None:
        """Initialise without bundles."""
        self.replica_id = replica_id
        self.bundles: dict[str, _Bundle] = {}

    async def carry(self, call: BundleCall) -> AsyncGenerator[list[tuple[int, BundledItem]], None]:
        """Yield an empty list at once, then the items of all streams, until none has been left for a while."""
        if call.replica_id != self.replica_id or call.ingress_id in self.bundles:
            return
        bundle = self.bundles[call.ingress_id] = _Bundle()
        try:
            yield []
            while True:
                try:
                    async with asyncio.timeout(_IDLE_S):
                        await bundle.changed.wait()
                except TimeoutError:
                    if bundle.num_streams:
                        continue
                    return
                await asyncio.sleep(GATHER_S)
                yield bundle.take()
        finally:
            bundle.is_open = False
            del self.bundles[call.ingress_id]

    async def send(
        self, place: StreamPlace, stream: AsyncGenerator[BundledItem | None, None], *, may_bundle: bool
    ) -> AsyncGenerator[StreamMessage, None]:
        """Yield the messages of a stream's own call; its items go with the ingress's bundle once there is one."""
        loop = asyncio.get_running_loop()
        bundle: _Bundle | None = None
        num_items, last_message = 0, loop.time()
        yield StreamStart(self.replica_id, is_bundled=False)
        try:
            async with aclosing(stream):
                async for item in stream:
                    num_items += item is not None
                    if bundle is None and may_bundle and place.ingress_id in self.bundles:
                        bundle = self.bundles[place.ingress_id]
                        bundle.num_streams += 1
                        yield StreamStart(self.replica_id, is_bundled=True)
                    if bundle is None:
                        yield item
                        continue
                    if not bundle.is_open:  # the ingress has lost it, and what was in it
                        yield LOST
                        return
                    if item is not None:
                        bundle.add(place.number, item)
                    if item is None or loop.time() - last_message > BEAT_S:
                        last_message = loop.time()
                        yield None
            yield StreamEnd(num_items)
        finally:
            if bundle is not None:
                bundle.num_streams -= 1
