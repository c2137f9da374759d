"""Responses that run an answer while the client is connected: as JSON, or as server-sent events."""

import asyncio
import json
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


class StreamedAnswer(Response):
    """A response that is generated while the client waits, and cancelled when it disconnects."""

    def __init__(
        self,
        pieces: AsyncGenerator[list[AnswerPiece], None],
        form: ChatForm,
        num_choices: int,
        on_end: Callable[[int], None],
    ) -> None:
        """Initialise for ``pieces`` in ``form``; ``on_end`` receives the status."""
        super().__init__()
        self.pieces = pieces
        self.form = form
        self.num_choices = num_choices
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
            choices = await collect_choices(self.pieces, self.num_choices)
            response = JSONResponse(self.form.whole(choices))
        except RefusalError as error:
            response = refused_response(error.refused)
        self.status_code = response.status_code
        await response(scope, receive, send)


class EventStream(StreamedAnswer):
    """A streamed answer as server-sent events; its status is known with the first piece."""

    def __init__(self, *arguments: Any, with_usage: bool) -> None:
        """Initialise as StreamedAnswer; ``with_usage`` adds an event with token counts."""
        super().__init__(*arguments)
        self.with_usage = with_usage

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
        choices = [Choice() for _ in range(self.num_choices)]
        try:
            await self.send_events(send, self.form.first(self.num_choices) + self.events(first, choices))
            async for pieces in self.pieces:
                await self.send_events(send, self.events(pieces, choices))
        except RefusalError as error:
            self.status_code = error.refused.status
            await _send_text(send, _event(error.refused.body()), more=False)
            return
        end = _event(self.form.last(choices)) if self.with_usage else ""
        await _send_text(send, end + "data: [DONE]\n\n", more=False)

    def events(self, pieces: list[AnswerPiece], choices: list[Choice]) -> list[dict[str, Any]]:
        """Convert pieces to events, joining those of one choice."""
        events = []
        for index, chunk in _joined(pieces):
            events.append(self.form.next(index, choices[index], chunk))
            choices[index].add(chunk)
        return events

    async def send_events(self, send: Send, events: list[dict[str, Any]]) -> None:
        """Send several events in one message."""
        if self.with_usage:
            events = [{**one, "usage": None} for one in events]
        await _send_text(send, "".join(_event(one) for one in events), more=True)


def _joined(pieces: list[AnswerPiece]) -> list[AnswerPiece]:
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
            )
        )
    return list(joined.items())


def _event(value: dict[str, Any]) -> str:
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
