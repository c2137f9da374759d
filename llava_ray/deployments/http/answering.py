"""Responses that run an answer while the client is connected: as JSON, or as server-sent events."""

import asyncio
import json
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing
from typing import Any

from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from llava_ray.deployments.http.responses import ChatForm, Choice, collect_choices
from llava_ray.deployments.refusal import RefusalError, Refused
from llava_ray.deployments.replica import AnswerPiece
from llava_ray.generate.engine import GenerationChunk

_EVENT_HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",  # nginx would buffer events
}


_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode  # dumps makes an encoder for each event


class AnswerResponse(Response, ABC):
    """A response that is generated while the client waits, and cancelled when it disconnects."""

    def __init__(self, pieces: AsyncGenerator[list[AnswerPiece], None], on_end: Callable[[int], None]) -> None:
        """Initialise for ``pieces``; ``on_end`` receives the status."""
        super().__init__()
        self.pieces = pieces
        self.on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the answer; cancel it when the client disconnects."""
        self.status_code = 499  # nginx's status for a client that disconnected
        try:
            async with aclosing(self.pieces):
                await _run_until_disconnect(receive, self.write(scope, receive, send))
        finally:
            self.on_end(self.status_code)

    async def write(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the whole answer as one JSON object."""
        try:
            response: Response = await self.read()
        except RefusalError as error:
            response = refused_response(error.refused)
        self.status_code = response.status_code
        await response(scope, receive, send)

    @abstractmethod
    async def read(self) -> Response:
        """Read the whole answer. Raises RefusalError."""


class StreamedAnswer(AnswerResponse):
    """An answer in one of the forms of chats and completions."""

    def __init__(
        self,
        pieces: AsyncGenerator[list[AnswerPiece], None],
        form: ChatForm,
        num_choices: int,
        on_end: Callable[[int], None],
    ) -> None:
        """Initialise for ``pieces`` in ``form``; ``on_end`` receives the status."""
        super().__init__(pieces, on_end)
        self.form = form
        self.num_choices = num_choices

    async def read(self) -> Response:
        """Read all choices and format them. Raises RefusalError."""
        return JSONResponse(self.form.whole(await collect_choices(self.pieces, self.num_choices)))


class EventResponse(AnswerResponse):
    """An answer as server-sent events; its status is known with the first piece."""

    async def write(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send events as pieces arrive; a failure before the first is an HTTP error, a later one an event."""
        try:
            first = await anext(aiter(self.pieces))
        except RefusalError as error:
            self.status_code = error.refused.status
            await refused_response(error.refused)(scope, receive, send)
            return
        self.status_code = 200
        headers = [(name.encode(), value.encode()) for name, value in _EVENT_HEADERS.items()]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        try:
            await _send_text(send, self.begin() + self.tell(first), more=True)
            async for pieces in self.pieces:
                await _send_text(send, self.tell(pieces), more=True)
        except RefusalError as error:
            self.status_code = error.refused.status
            await _send_text(send, self.fail(error.refused), more=False)
            return
        await _send_text(send, self.end(), more=False)

    @abstractmethod
    def begin(self) -> str:
        """Return the events before the first piece."""

    @abstractmethod
    def tell(self, pieces: list[AnswerPiece]) -> str:
        """Return the events of pieces, joining those of one choice."""

    @abstractmethod
    def fail(self, refused: Refused) -> str:
        """Return the last event of an answer that failed."""

    @abstractmethod
    def end(self) -> str:
        """Return the events after the last piece."""


class EventStream(EventResponse, StreamedAnswer):
    """A streamed answer in one of the forms of chats and completions."""

    def __init__(self, *arguments: Any, with_usage: bool) -> None:
        """Initialise as StreamedAnswer; ``with_usage`` adds an event with token counts."""
        super().__init__(*arguments)
        self.with_usage = with_usage
        self.choices = [Choice() for _ in range(self.num_choices)]

    def begin(self) -> str:
        """Return the events before the first piece."""
        return self.format_all(self.form.first(self.num_choices))

    def tell(self, pieces: list[AnswerPiece]) -> str:
        """Return the events of pieces, joining those of one choice."""
        events = []
        for index, chunk in join_pieces(pieces):
            events.append(self.form.next(index, self.choices[index], chunk))
            self.choices[index].add(chunk)
        return self.format_all(events)

    def fail(self, refused: Refused) -> str:
        """Return the event of an answer that failed."""
        return format_event(refused.body())

    def end(self) -> str:
        """Return the event with token counts, where it is asked for, and the mark of the end."""
        end = format_event(self.form.last(self.choices)) if self.with_usage else ""
        return end + "data: [DONE]\n\n"

    def format_all(self, events: list[dict[str, Any]]) -> str:
        """Format several events."""
        if self.with_usage:
            events = [{**one, "usage": None} for one in events]
        return "".join(format_event(one) for one in events)


def join_pieces(pieces: list[AnswerPiece]) -> list[AnswerPiece]:
    """Join the pieces of each choice into one."""
    joined: dict[int, GenerationChunk] = {}
    for index, chunk in pieces:
        before = joined.get(index)
        joined[index] = (
            chunk
            if before is None
            else GenerationChunk(
                text=before.text + chunk.text,
                token_ids=before.token_ids + chunk.token_ids,
                logprobs=before.logprobs + chunk.logprobs,
                finish_reason=chunk.finish_reason,
                num_prompt_tokens=max(before.num_prompt_tokens, chunk.num_prompt_tokens),
                num_cached_images=max(before.num_cached_images, chunk.num_cached_images),
                calls=before.calls + chunk.calls,
                num_cached_tokens=max(before.num_cached_tokens, chunk.num_cached_tokens),
                prompt_logprobs=before.prompt_logprobs,
            )
        )
    return list(joined.items())


def format_event(value: dict[str, Any]) -> str:
    """Format one server-sent event."""
    return f"data: {_encode(value)}\n\n"


async def _send_text(send: Send, text: str, *, more: bool) -> None:
    """Send a part of the body."""
    await send({"type": "http.response.body", "body": text.encode(), "more_body": more})


def refused_response(refused: Refused) -> JSONResponse:
    """Convert a refusal to a response."""
    return JSONResponse(refused.body(), refused.status, headers=refused.headers())


async def _run_until_disconnect(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Await ``work``, but cancel it as soon as the client disconnects."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_wait_for_disconnect(receive))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            working.result()
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _wait_for_disconnect(receive: Receive) -> None:
    """Wait until the client disconnects."""
    while (await receive())["type"] != "http.disconnect":
        pass
