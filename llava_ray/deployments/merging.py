"""Several streams into one, fewer and larger pieces where tokens come fast, signs of life where none come."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import TypeVar

T = TypeVar("T")

MERGE_S = 0.02  # at most so long is a piece held back for the next to go with it
_BEAT_S = 5.0  # a stream that has nothing to say says so this often

_END = None


async def merge_streams(
    streams: Sequence[AsyncGenerator[T, None]], pause_s: float | None = MERGE_S
) -> AsyncGenerator[list[tuple[int, T]], None]:
    """Yield what the streams give, each with its stream's index; together what comes within ``pause_s``.

    The first piece after a pause is passed on at once. With ``pause_s`` None everything comes in one list at the end.
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
    """Put what a stream gives on the queue, then END, or what it raises."""
    try:
        async with aclosing(stream):
            async for piece in stream:
                queue.put_nowait((index, piece))
        queue.put_nowait(_END)
    except Exception as error:  # noqa: BLE001 - whatever it is, it is raised where the streams are read
        queue.put_nowait(error)


async def with_heartbeats(stream: AsyncGenerator[T, None], beat_s: float = _BEAT_S) -> AsyncGenerator[T | None, None]:
    """Yield what a stream gives, and None whenever nothing has come for ``beat_s``; leaving it closes the stream."""
    coming: asyncio.Task[T] | None = None
    async with aclosing(stream):
        try:
            while True:
                coming = coming or asyncio.create_task(anext(stream))
                await asyncio.wait((coming,), timeout=beat_s)
                if not coming.done():
                    yield None
                    continue
                try:
                    item = coming.result()
                except StopAsyncIteration:
                    return
                finally:
                    coming = None
                yield item
        finally:
            if coming is not None:
                coming.cancel()
                await asyncio.gather(coming, return_exceptions=True)
