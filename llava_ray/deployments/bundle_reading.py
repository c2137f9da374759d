"""The streams of an ingress at the replicas of one model, and the calls that carry them bundled."""

import asyncio
import contextvars
import itertools
import logging
from collections import Counter
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from ray.exceptions import RayError, TaskCancelledError
from ray.serve.exceptions import DeploymentUnavailableError, RequestCancelledError
from ray.serve.handle import DeploymentHandle

from llava_ray.deployments.bundles import (
    LOST,
    BundleCall,
    BundledItem,
    StreamEnd,
    StreamMessage,
    StreamPlace,
    StreamStart,
)
from llava_ray.deployments.gateway import unwrapped
from llava_ray.deployments.messages import Task
from llava_ray.deployments.refusal import RefusalError
from llava_ray.deployments.replica import AnswerPiece

_log = logging.getLogger(__name__)

SILENCE_S = 20.0  # without a piece or a heartbeat, which come every merging.BEAT_S
_OPEN_S = 10.0  # for a call that carries to reach its replica
_MIN_STREAMS = 2  # a lone stream is as cheap alone

_Arrival = BundledItem | StreamEnd | Exception | None  # None is the end of a stream's own call


class _Stream:
    """The items that have arrived for one stream, by its call or in bundles; a slow client adds text only."""

    def __init__(self) -> None:
        self.arrived: asyncio.Queue[_Arrival] = asyncio.Queue()
        self.start: StreamStart | None = None
        self.has_ended = False
        """Whether its own call has ended, by itself or by Serve."""
        self.early: list[BundledItem] = []
        """Items of bundles that overtook the messages of the stream's own call from before it was bundled."""

    def add_bundled(self, item: BundledItem) -> None:
        if self.start is not None and self.start.is_bundled:
            self.arrived.put_nowait(item)
        else:
            self.early.append(item)


class StreamCalls:
    """Calls of ``run`` of a model's replicas."""

    def __init__(self, handle: DeploymentHandle, ingress_id: str) -> None:
        """Initialise for a model's handle; ``ingress_id`` is that of this process alone."""
        # By value: over gRPC, not as Ray objects.
        self.handle = handle.options(stream=True, _by_reference=False)
        self.ingress_id = ingress_id
        self.numbers = itertools.count()
        self.streams: dict[int, _Stream] = {}
        self.at_replica: Counter[str] = Counter()
        self.carriers: dict[str, asyncio.Task[None]] = {}

    async def call(self, task: Task, session: str, timeout_s: float | None) -> AsyncGenerator[list[AnswerPiece], None]:
        """Call a replica's ``run``; leaving the iterator early cancels it there.

        Raises RefusalError, TimeoutError for a replica without heartbeats (or without a first message within
        ``timeout_s`` seconds), and Ray's own errors.
        """
        number, stream = next(self.numbers), _Stream()
        self.streams[number] = stream
        response = self.handle.options(session_id=session).run.remote(task, StreamPlace(self.ingress_id, number))
        reading = asyncio.create_task(self.read(aiter(response), stream, timeout_s))
        try:
            async with aclosing(self.items(stream)) as items:
                async for item in items:
                    yield unwrapped(item)
        finally:
            del self.streams[number]
            if stream.start is not None:
                self.at_replica[stream.start.replica_id] -= 1
                self.at_replica += Counter()  # without those of no streams
            if not stream.has_ended:
                response.cancel()
                reading.cancel()
                await asyncio.gather(reading, return_exceptions=True)

    async def items(self, stream: _Stream) -> AsyncGenerator[BundledItem, None]:
        """Yield a stream's items until its own call has ended and all have arrived. Raises what reading raised."""
        num_items, expected, is_closed = 0, 0, False
        while not is_closed or num_items < expected:
            async with asyncio.timeout(SILENCE_S if is_closed else None):
                arrival = await stream.arrived.get()
            if arrival is None:
                is_closed = True
            elif isinstance(arrival, Exception):
                raise arrival
            elif isinstance(arrival, StreamEnd):
                expected = arrival.num_items
            else:
                num_items += 1
                yield arrival

    def note_start(self, stream: _Stream, start: StreamStart) -> None:
        """Note a stream's replica; open a call that carries where it has several."""
        if stream.start is None:
            self.at_replica[start.replica_id] += 1
        stream.start = start
        if start.is_bundled:
            for item in stream.early:
                stream.arrived.put_nowait(item)
        elif self.at_replica[start.replica_id] >= _MIN_STREAMS and start.replica_id not in self.carriers:
            # Outside of this request's context, with which Serve would cancel it.
            opening = self.carry(start.replica_id)
            self.carriers[start.replica_id] = asyncio.create_task(opening, context=contextvars.Context())

    async def carry(self, replica_id: str) -> None:
        """Hand out the items of a replica's bundles until it ends them; end their streams if it is lost."""
        response = self.handle.carry.remote(BundleCall(self.ingress_id, replica_id))
        bundles = aiter(response)
        try:
            async with asyncio.timeout(_OPEN_S):
                await anext(bundles, None)
            async for bundle in bundles:
                for number, item in bundle:
                    if number in self.streams:  # its client may have gone
                        self.streams[number].add_bundled(item)
        except Exception as error:  # noqa: BLE001 - of whatever kind, the streams in it cannot go on
            _log.warning("the bundled streams of replica %s ended: %s", replica_id, type(error).__name__)
            response.cancel()
            for stream in self.streams.values():
                if stream.start == StreamStart(replica_id, is_bundled=True):
                    stream.arrived.put_nowait(error if isinstance(error, RayError) else RefusalError(LOST))
        finally:
            del self.carriers[replica_id]

    async def read(self, messages: Any, stream: _Stream, timeout_s: float | None) -> None:
        """Read a stream's own call to its end, or an error."""
        try:
            while True:
                async with asyncio.timeout(timeout_s):
                    message: StreamMessage = await anext(messages)
                timeout_s = SILENCE_S
                if isinstance(message, StreamStart):
                    self.note_start(stream, message)
                elif message is not None:
                    stream.arrived.put_nowait(message)
        except StopAsyncIteration:
            stream.has_ended = True
            stream.arrived.put_nowait(None)
        except (DeploymentUnavailableError, RequestCancelledError, TaskCancelledError):
            stream.has_ended = True
            stream.arrived.put_nowait(RefusalError(LOST))
        except Exception as error:  # noqa: BLE001 - raised again by the reader of the stream
            stream.arrived.put_nowait(error)
