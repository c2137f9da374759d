"""Routes that ask for no answer: ``/v1/embeddings``, and vLLM's ``/tokenize`` and ``/detokenize``."""

import array
import asyncio
import base64
import sys
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from llava_ray.deployments.gateway import find_model_of
from llava_ray.deployments.http.answering import AnswerResponse
from llava_ray.deployments.http.reading_fields import DetokenizeRequest, EmbeddingsRequest, TokenizeRequest
from llava_ray.deployments.http.reading_tasks import detokenize_task, embeddings_task, tokenize_task
from llava_ray.deployments.messages import Task
from llava_ray.deployments.refusal import RefusalError, Refused
from llava_ray.deployments.replica import AnswerPiece
from llava_ray.generate.engine import GenerationChunk
from llava_ray.generate.readings import PromptReading

if TYPE_CHECKING:
    from llava_ray.deployments.http.routes import Front

# Fields of chats, which refusals of replicas name.
_OF_CHATS = ("messages", "prompt")

Format = Callable[[Sequence[GenerationChunk]], dict[str, Any]]


class ReadingResponse(AnswerResponse):
    """A response that is formatted from all results of a job, in a thread since there may be many numbers."""

    def __init__(
        self,
        pieces: AsyncGenerator[list[AnswerPiece], None],
        task: Task,
        form: Format,
        on_end: Callable[[int], None],
    ) -> None:
        """Initialise for the ``pieces`` of ``task``; ``on_end`` receives the status."""
        assert task.job is not None
        super().__init__(rename_chat_fields(pieces, task.job.field), on_end)
        self.num_results = task.num_choices
        self.form = form

    async def read(self) -> Response:
        """Read and format all results. Raises RefusalError."""
        found: list[GenerationChunk | None] = [None] * self.num_results
        async for pieces in self.pieces:
            for index, chunk in pieces:
                found[index] = chunk
        chunks = [chunk for chunk in found if chunk is not None]
        assert len(chunks) == self.num_results
        return await asyncio.to_thread(lambda: JSONResponse(self.form(chunks)))


async def rename_chat_fields(
    pieces: AsyncGenerator[list[AnswerPiece], None], field: str
) -> AsyncGenerator[list[AnswerPiece], None]:
    """Yield pieces. Raises their RefusalError with ``field`` in place of a chat's own."""
    async with aclosing(pieces):
        try:
            async for some in pieces:
                yield some
        except RefusalError as error:
            raise RefusalError(_with_field(error.refused, field)) from error


def _with_field(refused: Refused, field: str) -> Refused:
    return replace(refused, param=field) if refused.param in _OF_CHATS else refused


def add_reading_routes(app: FastAPI, front: "Front") -> None:
    """Add the routes."""

    async def respond(task: Task, form: Format, request: Request) -> Response:
        # Without a session: nothing ties them to one replica.
        pieces, count = front.start(task, request, session=task.request_id)
        return ReadingResponse(pieces, task, form, count)

    async def embed(request: Request) -> Response:
        body = await front.read(EmbeddingsRequest, request)
        task = await front.located(embeddings_task(body, f"embd-{uuid.uuid4().hex}", front.settings))
        return await respond(task, lambda chunks: format_embeddings(body, chunks), request)

    async def tokenize(request: Request) -> Response:
        body = await front.read(TokenizeRequest, request)
        model = body.model or front.gateway.sources[0].name
        task = await front.located(tokenize_task(body, model, f"tok-{uuid.uuid4().hex}", front.settings))
        card = await front.gateway.card(find_model_of(front.gateway.sources, task))
        return await respond(task, lambda chunks: format_tokens(body, chunks, card.max_model_len), request)

    async def detokenize(request: Request) -> Response:
        body = await front.read(DetokenizeRequest, request)
        model = body.model or front.gateway.sources[0].name
        task = await front.located(detokenize_task(body, model, f"tok-{uuid.uuid4().hex}", front.settings))
        return await respond(task, lambda chunks: {"prompt": _reading_of(chunks[0]).text}, request)

    app.add_api_route("/v1/embeddings", embed, methods=["POST"], response_model=None)
    app.add_api_route("/tokenize", tokenize, methods=["POST"], response_model=None)
    app.add_api_route("/detokenize", detokenize, methods=["POST"], response_model=None)


def format_embeddings(request: EmbeddingsRequest, chunks: Sequence[GenerationChunk]) -> dict[str, Any]:
    """Format vectors as OpenAI does."""
    num_tokens = sum(chunk.num_prompt_tokens for chunk in chunks)
    form = _as_base64 if request.encoding_format == "base64" else _as_numbers
    return {
        "object": "list",
        "data": [
            {"object": "embedding", "index": index, "embedding": form(_reading_of(chunk).vector)}
            for index, chunk in enumerate(chunks)
        ],
        "model": request.model,
        "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens},
    }


def format_tokens(request: TokenizeRequest, chunks: Sequence[GenerationChunk], max_model_len: int) -> dict[str, Any]:
    """Format tokens as vLLM does."""
    reading = _reading_of(chunks[0])
    return {
        "count": len(reading.token_ids),
        "max_model_len": max_model_len,
        "tokens": list(reading.token_ids),
        "token_strs": list(reading.token_texts) if request.return_token_strs else None,
    }


def _reading_of(chunk: GenerationChunk) -> PromptReading:
    assert chunk.reading is not None
    return chunk.reading


def _as_base64(vector: bytes) -> str:
    return base64.b64encode(vector).decode()


def _as_numbers(vector: bytes) -> list[float]:
    values = array.array("f", vector)
    if sys.byteorder == "big":
        values.byteswap()
    return values.tolist()
