"""Answers for the page: the same models, queue, checks and metrics as the API's, with a stop button."""

import asyncio
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing, contextmanager
from typing import Any, TypeVar

from starlette.types import Scope

from llava_ray.deployments.chat_page.chat import (
    CURSOR,
    AnswerMetrics,
    ChatbotMessage,
    Parameters,
    chat_request,
    paths_of,
)
from llava_ray.deployments.chat_page.uploads import Uploads
from llava_ray.deployments.http.auth import ApiKey
from llava_ray.deployments.http.limits import holder_of, too_many_bytes_in_flight
from llava_ray.deployments.http.routes import Front
from llava_ray.deployments.refusal import RefusalError

T = TypeVar("T")

_SHOW_S = 0.1  # the browser is sent no more than ten states a second


class Answers:
    """The running answers by session."""

    def __init__(self, front: Front, uploads: Uploads) -> None:
        """Initialise for the models of ``front`` and images in ``uploads``."""
        self.front = front
        self.uploads = uploads
        self.stops: dict[str, asyncio.Event] = {}

    async def write(
        self, history: Sequence[ChatbotMessage], parameters: Parameters, session: str, scope: Scope
    ) -> AsyncGenerator[tuple[list[Any], AnswerMetrics], None]:
        """Yield the chat with its growing answer, and its metrics. Raises RefusalError."""
        self.admit(scope)
        with self.holding(history, scope):
            async with aclosing(self.write_admitted(history, parameters, session)) as states:
                async for state in states:
                    yield state

    async def write_admitted(
        self, history: Sequence[ChatbotMessage], parameters: Parameters, session: str
    ) -> AsyncGenerator[tuple[list[Any], AnswerMetrics], None]:
        """Yield the chat with its growing answer, and its metrics. Raises RefusalError."""
        stop = self.stops[session] = asyncio.Event()
        metrics, last_sent = AnswerMetrics(), 0.0
        request = await asyncio.to_thread(chat_request, history, parameters, self.uploads)
        task = self.front.checked(request)
        try:
            async with aclosing(iterate_until(self.front.gateway.run(task, session), stop)) as pieces:
                async for batch in pieces:
                    metrics.add(batch)
                    if time.monotonic() - last_sent >= _SHOW_S:
                        last_sent = time.monotonic()
                        yield _with_answer(history, metrics.answer.text + CURSOR), metrics
            yield _with_answer(history, metrics.answer.text), metrics
        except RefusalError:
            if metrics.answer.text:  # keep the part of the answer before the failure
                yield _with_answer(history, metrics.answer.text), metrics
            raise
        finally:
            if self.stops.get(session) is stop:
                del self.stops[session]

    def stop(self, session: str) -> None:
        """Stop the running answer of a session; its text so far stays."""
        if session in self.stops:
            self.stops[session].set()

    @contextmanager
    def holding(self, history: Sequence[ChatbotMessage], scope: Scope) -> Iterator[None]:
        """Count a chat's image bytes against the limits while the block runs. Raises RefusalError."""
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
        """Return whether a key belongs to a name."""
        found: ApiKey | None = self.front.guard.find(key)
        return found is not None and found.name == name


def _with_answer(history: Sequence[ChatbotMessage], text: str) -> list[Any]:
    """Return the chat with an answer at its end."""
    return [*history, {"role": "assistant", "content": text}]


async def iterate_until(stream: AsyncGenerator[T, None], stop: asyncio.Event) -> AsyncGenerator[T, None]:
    """Yield from a stream until the event is set; close the stream in any case."""
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
