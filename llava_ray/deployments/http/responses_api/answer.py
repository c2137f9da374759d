"""The responses of ``POST /v1/responses``: as JSON, or as server-sent events."""

import json
from collections.abc import AsyncGenerator, Callable
from typing import Any

from starlette.responses import JSONResponse, Response

from llava_ray.deployments.http.answering import AnswerResponse, EventResponse, join_pieces
from llava_ray.deployments.http.responses_api.conversion import renamed
from llava_ray.deployments.http.responses_api.events import ResponseEvent, ResponseWriter
from llava_ray.deployments.refusal import Refused
from llava_ray.deployments.replica import AnswerPiece


class ResponsesAnswer(AnswerResponse):
    """A whole response."""

    def __init__(
        self,
        pieces: AsyncGenerator[list[AnswerPiece], None],
        writer: ResponseWriter,
        on_end: Callable[[int], None],
    ) -> None:
        """Initialise for the ``pieces`` of the only choice; ``on_end`` receives the status."""
        super().__init__(renamed(pieces), on_end)
        self.writer = writer

    async def read(self) -> Response:
        """Read the whole answer. Raises RefusalError."""
        async for pieces in self.pieces:
            for _, chunk in join_pieces(pieces):
                self.writer.add(chunk)
        return JSONResponse(self.writer.end()[-1]["response"])


class ResponsesStream(EventResponse, ResponsesAnswer):
    """A response as events, which begin with its creation and end with the whole of it."""

    def begin(self) -> str:
        """Return the events before the first piece."""
        return _format_all(self.writer.begin())

    def tell(self, pieces: list[AnswerPiece]) -> str:
        """Return the events of pieces."""
        return _format_all([event for _, chunk in join_pieces(pieces) for event in self.writer.add(chunk)])

    def fail(self, refused: Refused) -> str:
        """Return the last events of an answer that failed."""
        return _format_all(self.writer.fail(refused))

    def end(self) -> str:
        """Return the events after the last piece."""
        return _format_all(self.writer.end())


def _format_all(events: list[ResponseEvent]) -> str:
    return "".join(f"event: {event['type']}\ndata: {_dump(event)}\n\n" for event in events)


def _dump(event: Any) -> str:
    return json.dumps(event, ensure_ascii=False, separators=(",", ":"))
