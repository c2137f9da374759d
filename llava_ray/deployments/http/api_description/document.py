"""The OpenAPI document of the API."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from llava_ray.deployments.http.adapter_routes import LoadRequest, UnloadRequest
from llava_ray.deployments.http.api_description.answers import SCHEMAS
from llava_ray.deployments.http.api_description.examples import Examples, list_examples
from llava_ray.deployments.http.middleware import guarded_paths
from llava_ray.deployments.http.reading_fields import DetokenizeRequest, EmbeddingsRequest, TokenizeRequest
from llava_ray.deployments.http.responses import find_system_fingerprint
from llava_ray.deployments.http.responses_api.fields import ResponsesRequest
from llava_ray.deployments.http.schema import ChatRequest, CompletionRequest
from llava_ray.deployments.settings import ServeSettings

_JSON, _PLAIN, _HTML, _EVENTS = "application/json", "text/plain", "text/html", "text/event-stream"


@dataclass(frozen=True)
class Operation:
    """One route as the document describes it."""

    path: str
    summary: str
    answer: str = ""
    """The name of its response's schema; without one it is text."""
    request: type[BaseModel] | None = None
    """The schema of its body; a route without one is a GET."""
    media_type: str = _JSON
    streams: bool = False
    unready: bool = False
    """Whether it answers 503 with the same schema too."""

    @property
    def method(self) -> str:
        """Return its HTTP method, in lower case."""
        return "get" if self.request is None else "post"


OPERATIONS = (
    Operation("/v1/chat/completions", "Answer a chat with images", "ChatCompletion", ChatRequest, streams=True),
    Operation("/v1/completions", "Continue a raw text", "TextCompletion", CompletionRequest, streams=True),
    Operation("/v1/responses", "Answer a conversation, as OpenAI's", "Response", ResponsesRequest, streams=True),
    Operation("/v1/embeddings", "Return features of texts, chats or images", "Embeddings", EmbeddingsRequest),
    Operation("/tokenize", "Return the tokens of a prompt or a chat", "Tokens", TokenizeRequest),
    Operation("/detokenize", "Return the text of tokens", "Text", DetokenizeRequest),
    Operation("/v1/models", "List the models and adapters", "Models"),
    Operation("/v1/models/{name}", "Describe a model or an adapter", "Model"),
    Operation("/v1/load_lora_adapter", "Load a LoRA adapter (admins)", request=LoadRequest, media_type=_PLAIN),
    Operation("/v1/unload_lora_adapter", "Unload a LoRA adapter (admins)", request=UnloadRequest, media_type=_PLAIN),
    Operation("/health", "Say that the process is alive", "Health"),
    Operation("/ready", "Say whether each model can take a request", "Readiness", unready=True),
    Operation("/version", "Return the version", "Version"),
    Operation("/metrics", "Return the metrics of all processes for Prometheus", media_type=_PLAIN),
    Operation("/openapi.json", "Return this document", "OpenAPI"),
    Operation("/docs", "Show this document as a page", media_type=_HTML),
    Operation("/redoc", "Show the same page", media_type=_HTML),
)  # fmt: skip


def describe_api(settings: ServeSettings, *, with_keys: bool) -> dict[str, Any]:
    """Return the document; ``with_keys`` says whether requests need a key."""
    models = [operation.request for operation in OPERATIONS if operation.request is not None]
    found, definitions = models_json_schema(
        [(model, "validation") for model in models], ref_template="#/components/schemas/{model}"
    )
    names = {model: found[model, "validation"]["$ref"] for model in models}
    examples = list_examples(settings)
    paths: dict[str, Any] = {}
    for operation in OPERATIONS:
        described = _describe(operation, names, examples.get(operation.path, {}))
        if with_keys and operation.path.startswith(guarded_paths(api_docs=True)):
            described["security"] = [{"key": []}]
        paths.setdefault(operation.path, {})[operation.method] = described
    components: dict[str, Any] = {
        "schemas": {**definitions.get("$defs", {}), **SCHEMAS, "OpenAPI": {"type": "object"}},
    }
    if with_keys:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "llava_ray",
            "version": find_system_fingerprint(),
            "description": "OpenAI's API over LLaVA models. A null is as good as an absent field; unknown fields are "
            "refused by name. Errors are OpenAI's objects, whose param is the field.",
        },
        "paths": paths,
        "components": components,
    }


def _describe(operation: Operation, names: Mapping[type[BaseModel], str], examples: Examples) -> dict[str, Any]:
    """Describe one route."""
    content: dict[str, Any] = {
        operation.media_type: {"schema": _ref(operation.answer) if operation.answer else {"type": "string"}}
    }
    if operation.streams:
        content[_EVENTS] = {"schema": {"type": "string", "description": "Server-sent events, with stream = true."}}
    responses: dict[str, Any] = {"200": {"description": operation.summary, "content": content}}
    if operation.unready:
        responses["503"] = {"description": "Some model cannot", "content": content}
    responses["default"] = {"description": "Why not", "content": {_JSON: {"schema": _ref("Error")}}}
    described: dict[str, Any] = {
        "summary": operation.summary,
        "operationId": f"{operation.method}{operation.path}".replace("/", "_").strip("{}_").replace("{", ""),
        "responses": responses,
    }
    if operation.request is not None:
        body = {"schema": {"$ref": names[operation.request]}}
        shown = {"examples": {name: {"value": value} for name, value in examples.items()}} if examples else {}
        described["requestBody"] = {"required": True, "content": {_JSON: {**body, **shown}}}
    parameters = _find_parameters(operation.path)
    if parameters:
        described["parameters"] = parameters
    return described


def _find_parameters(path: str) -> Sequence[dict[str, Any]]:
    """Return the parameters in a path."""
    names = [part.strip("{}") for part in path.split("/") if part.startswith("{")]
    return [{"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names]


def _ref(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}
