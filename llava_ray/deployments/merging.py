"""Merging of streams, with batched pieces where tokens come fast, and heartbeats where none come."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import TypeVar

T = TypeVar("T")

MERGE_S = 0.02  # the longest delay of a piece to batch it with the next ones
BEAT_S = 5.0  # interval of heartbeats of a silent stream

_END = None


async def merge_streams(
    streams: Sequence[AsyncGenerator[T, None]], pause_s: float | None = MERGE_S
) -> AsyncGenerator[list[tuple[int, T]], None]:
    """Yield the streams' items with their stream's index, batching those within ``pause_s``.

    The first item after a pause is yielded at once. With ``pause_s`` None all items come in one list at the end.
    The pause is the backpressure: while the consumer is slow the queue grows by text only, and is sent in larger lists.
    Leaving the iterator closes the streams; the first error of any of them closes the others and is raised.
    """
    loop = asyncio.get_running_loop()
    queue: asyncio.Queue[tuple[int, T] | Exception | None] = asyncio.Queue()
    tasks = [asyncio.create_task(_pump(stream, index, queue)) for index, stream in enumerate(streams)]
    num_open, last_time = len(tasks), float("-inf")
    pieces: list[tuple[int, T]] = []
    try:
        while num_open:
            entries = [await queue.get()]
            if pause_s is not None:
                await asyncio.sleep(max(0.0, last_time + pause_s - loop.time()))
            while not queue.empty():
                entries.append(queue.get_nowait())
            for entry in entries:
                if isinstance(entry, Exception):
                    raise entry
            num_open -= entries.count(_END)
            pieces += [entry for entry in entries if isinstance(entry, tuple)]
            if pieces and (pause_s is not None or not num_open):
                last_time = loop.time()
                yield pieces
                pieces = []
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _pump(
    stream: AsyncGenerator[T, None], index: int, queue: "asyncio.Queue[tuple[int, T] | Exception | None]"
) -> None:
    """Put a stream's items on the queue, then END or its exception."""
    try:
        async with aclosing(stream):
            async for piece in stream:
                queue.put_nowait((index, piece))
        queue.put_nowait(_END)
    except Exception as error:  # noqa: BLE001 - raised again by the reader of the queue
        queue.put_nowait(error)


async def with_heartbeats(stream: AsyncGenerator[T, None], beat_s: float = BEAT_S) -> AsyncGenerator[T | None, None]:
    """Yield a stream's items, and None whenever nothing has come for ``beat_s``; close the stream at the end."""
    pending: asyncio.Task[T] | None = None
    async with aclosing(stream):
        try:
            while True:
                pending = pending or asyncio.create_task(anext(stream))
                await asyncio.wait((pending,), timeout=beat_s)
                if not pending.done():
                    yield None
                    continue
                try:
                    item = pending.result()
                except StopAsyncIteration:
                    return
                finally:
                    pending = None
                yield item
        finally:
            if pending is not None:
                pending.cancel()
                await asyncio.gather(pending, return_exceptions=True)
