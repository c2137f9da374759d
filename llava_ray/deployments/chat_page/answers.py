"""Answers for the page: the same models, queue, checks and counts as the API's, and a way to stop."""

import asyncio
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing, contextmanager
from typing import Any, TypeVar

from starlette.types import Scope

from llava_ray.deployments.chat_page.chat import CURSOR, AnswerMetrics, Parameters, Shown, chat_request, paths_of
from llava_ray.deployments.chat_page.uploads import Uploads
from llava_ray.deployments.http.auth import ApiKey
from llava_ray.deployments.http.limits import holder_of, too_many_bytes_in_flight
from llava_ray.deployments.http.routes import Front
from llava_ray.deployments.refusal import RefusalError

T = TypeVar("T")

_SHOW_S = 0.1  # the browser is sent no more than ten states a second


class Answers:
    """What is being written, session by session."""

    def __init__(self, front: Front, uploads: Uploads) -> None:
        """Ask through ``front`` about images in ``uploads``."""
        self.front = front
        self.uploads = uploads
        self.stops: dict[str, asyncio.Event] = {}

    async def write(
        self, history: Sequence[Shown], parameters: Parameters, session: str, scope: Scope
    ) -> AsyncGenerator[tuple[list[Any], AnswerMetrics], None]:
        """Yield the chat with its answer as it grows, and its figures. Raises RefusalError."""
        self.admit(scope)
        with self.holding(history, scope):
            async with aclosing(self.write_admitted(history, parameters, session)) as states:
                async for state in states:
                    yield state

    async def write_admitted(
        self, history: Sequence[Shown], parameters: Parameters, session: str
    ) -> AsyncGenerator[tuple[list[Any], AnswerMetrics], None]:
        """Yield the chat with its answer as it grows, and its figures. Raises RefusalError."""
        stop = self.stops[session] = asyncio.Event()
        figures, shown = AnswerMetrics(), 0.0
        asked = await asyncio.to_thread(chat_request, history, parameters, self.uploads)
        task = self.front.checked(asked)
        try:
            async with aclosing(until(self.front.gateway.run(task, session), stop)) as pieces:
                async for batch in pieces:
                    figures.add(batch)
                    if time.monotonic() - shown >= _SHOW_S:
                        shown = time.monotonic()
                        yield _with_answer(history, figures.answer.text + CURSOR), figures
            yield _with_answer(history, figures.answer.text), figures
        except RefusalError:
            if figures.answer.text:  # what came before the failure stays
                yield _with_answer(history, figures.answer.text), figures
            raise
        finally:
            if self.stops.get(session) is stop:
                del self.stops[session]

    def stop(self, session: str) -> None:
        """End what is being written for a session; what there is of it stays."""
        if session in self.stops:
            self.stops[session].set()

    @contextmanager
    def holding(self, history: Sequence[Shown], scope: Scope) -> Iterator[None]:
        """Hold a chat's images against the bytes of all, and of its user, while the block runs. Raises RefusalError."""
        limits = self.front.bytes_in_flight
        num_bytes = self.uploads.check(paths_of(history))
        with limits.hold(holder_of(scope), num_bytes, too_many_bytes_in_flight(limits)):
            yield

    def admit(self, scope: Scope) -> None:
        """Count a question, a vote or an export against its user's rate. Raises RefusalError (429)."""
        refused = self.front.guard.admit(scope["api_key"])
        if refused is not None:
            self.front.count_refused(refused)
            raise RefusalError(refused)

    def log_in(self, name: str, key: str) -> bool:
        """Whether this is a key and its name."""
        found: ApiKey | None = self.front.guard.find(key)
        return found is not None and found.name == name


def _with_answer(history: Sequence[Shown], text: str) -> list[Any]:
    """Return the chat with an answer at its end."""
    return [*history, {"role": "assistant", "content": text}]


async def until(stream: AsyncGenerator[T, None], stop: asyncio.Event) -> AsyncGenerator[T, None]:
    """Pass a stream on until the event is set; leaving it, either way, closes it."""
    stopping = asyncio.ensure_future(stop.wait())
    following: asyncio.Future[T] | None = None
    async with aclosing(stream):
        try:
            while True:
                following = asyncio.ensure_future(anext(stream))
                await asyncio.wait((following, stopping), return_when=asyncio.FIRST_COMPLETED)
                if not following.done():
                    return
                try:
                    item = following.result()
                except StopAsyncIteration:
                    return
                yield item
        finally:
            stopping.cancel()
            if following is not None and not following.done():
                following.cancel()
                await asyncio.gather(following, return_exceptions=True)
