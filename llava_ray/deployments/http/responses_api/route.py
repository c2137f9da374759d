"""The route of the Responses API."""

import uuid
from typing import TYPE_CHECKING

from fastapi import FastAPI, Request
from fastapi.responses import Response

from llava_ray.deployments.http.responses_api.answer import ResponsesAnswer, ResponsesStream
from llava_ray.deployments.http.responses_api.conversion import as_chat, rename_fields
from llava_ray.deployments.http.responses_api.events import ResponseWriter
from llava_ray.deployments.http.responses_api.fields import ResponsesRequest
from llava_ray.deployments.messages import chat_task
from llava_ray.deployments.refusal import RefusalError

if TYPE_CHECKING:
    from llava_ray.deployments.http.routes import Front


def add_responses(app: FastAPI, front: "Front") -> None:
    """Add the route; a response runs as a chat does."""

    async def respond(request: Request) -> Response:
        body = await front.read(ResponsesRequest, request)
        response_id = f"resp_{uuid.uuid4().hex}"
        try:
            task = await front.located(chat_task(as_chat(body), response_id, front.settings))
        except RefusalError as error:
            raise RefusalError(rename_fields(error.refused)) from error
        pieces, count = front.start(task, request)
        kind = ResponsesStream if body.stream else ResponsesAnswer
        return kind(pieces, ResponseWriter(response_id, body), count)

    app.add_api_route("/v1/responses", respond, methods=["POST"], response_model=None)
