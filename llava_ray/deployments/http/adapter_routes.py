"""Routes that load and unload LoRA adapters while the service runs, in the form of vLLM's."""

from collections.abc import Awaitable, Callable
from typing import Annotated, Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import PlainTextResponse, Response
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from llava_ray.deployments.gateway import Gateway
from llava_ray.deployments.http.auth import ANYBODY, ApiKey
from llava_ray.deployments.http.complaints import describe_invalid_request
from llava_ray.deployments.refusal import RefusalError, refuse
from llava_ray.deployments.settings import ServeSettings

# Names are parts of paths (/v1/models/NAME) and of log lines.
_Name = Annotated[str, Field(max_length=128, pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/@+-]*$")]


class _AdapterRequest(BaseModel):
    """A request about one adapter."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, hide_input_in_errors=True)

    lora_name: _Name

    @model_validator(mode="before")
    @classmethod
    def without_nulls(cls, values: Any) -> Any:
        """Drop nulls, which are as good as absent."""
        return (
            {key: value for key, value in values.items() if value is not None} if isinstance(values, dict) else values
        )


class LoadRequest(_AdapterRequest):
    """``POST /v1/load_lora_adapter``."""

    lora_path: str = Field(min_length=1)
    """A folder on every machine of the replicas, or an http(s) address of one."""
    load_inplace: bool = False
    """Whether to replace an adapter of this name."""
    base_model_name: str | None = None
    """The model that it is served over, by default the first."""


class UnloadRequest(_AdapterRequest):
    """``POST /v1/unload_lora_adapter``."""

    lora_int_id: int | None = None
    """vLLM's number of the adapter; without effect, as there."""


R = TypeVar("R", bound=_AdapterRequest)


def add_adapter_routes(app: FastAPI, gateway: Gateway, settings: ServeSettings) -> None:
    """Add both routes; without the settings that allow them they say which are missing."""

    async def load(request: Request) -> Response:
        check_admin(request, settings)
        body = parse(LoadRequest, await request.body())
        await gateway.adapters.load(body.lora_name, body.lora_path, body.base_model_name, replacing=body.load_inplace)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")

    async def unload(request: Request) -> Response:
        check_admin(request, settings)
        body = parse(UnloadRequest, await request.body())
        await gateway.adapters.unload(body.lora_name)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")

    routes: dict[str, Callable[[Request], Awaitable[Response]]] = {
        "/v1/load_lora_adapter": load,
        "/v1/unload_lora_adapter": unload,
    }
    for path, route in routes.items():
        app.add_api_route(path, route, methods=["POST"], response_model=None)


def check_admin(request: Request, settings: ServeSettings) -> None:
    """Check that adapters may be loaded, and with this request's key. Raises RefusalError (404, 403)."""
    if not settings.loads_adapters:
        raise refuse(
            404,
            "this service loads no adapters while it runs; start it with admin_keys, and with allowed_adapter_paths or "
            "allowed_adapter_urls",
            "adapters_closed",
        )
    key: ApiKey = request.scope.get("api_key", ANYBODY)
    if not key.sha256 or key.name not in settings.admin_keys:
        raise refuse(403, "this API key may not load or unload adapters (admin_keys)", "not_admin")


def parse(kind: type[R], body: bytes) -> R:
    """Parse and validate a body. Raises RefusalError (400) that names the field."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        raise _refusal_of(error) from None


def _refusal_of(error: ValidationError) -> RefusalError:
    return describe_invalid_request(error)
