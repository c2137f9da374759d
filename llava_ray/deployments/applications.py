"""The applications of Ray Serve: one deployment per model, and an ingress in front of them."""

import logging
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from prometheus_client.core import Metric
from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, RequestRouterConfig
from ray.serve.handle import DeploymentHandle

from llava_ray.deployments import message_sizes
from llava_ray.deployments.adapters.methods import AdapterMethods
from llava_ray.deployments.bundles import ReplicaBundles
from llava_ray.deployments.engines import make_engine
from llava_ray.deployments.front import build_front
from llava_ray.deployments.handles import ServeGateway, collect_metrics
from llava_ray.deployments.http.auth import ApiKey, check_admin_keys, read_api_keys
from llava_ray.deployments.http.routes import Front
from llava_ray.deployments.model_source import ModelSource
from llava_ray.deployments.replica import Replica
from llava_ray.deployments.routing import SessionRouter
from llava_ray.deployments.settings import ServeSettings
from llava_ray.deployments.stream_methods import StreamMethods
from llava_ray.deployments.tracing import traced
from llava_ray.deployments.watchdog import start_watchdog
from llava_ray.generate.engine import ModelCard

# Serve restarts a replica after the third failure in a row: after 30 s, like the original's controller.
_HEALTH = {"health_check_period_s": 5, "health_check_timeout_s": 10}

# Environment of the ingress and replica processes, on whichever cluster they start.
_RUNTIME_ENV = {
    "env_vars": {
        # Nothing here blocks the event loop, the model runs in its own thread: a second loop for Serve's own work
        # would only cost each token two more thread switches.
        "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
        "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
        # A request and its images are one gRPC message; the default limit is 4 MiB.
        message_sizes.GRPC_SIZE_VARIABLE: str(message_sizes.MAX_MESSAGE_BYTES),
    }
}

# Calls over a replica's own limit that Serve still forwards, so that the replica rejects them at once with 429
# instead of Serve queueing them without bound.
_SPARE_CALLS = 256
_INGRESS_CALLS = 2000
_CALLS_PER_INGRESS = 100.0
INGRESS_CPUS = 0.1


def log_where_serve_does() -> None:
    """Write this package's messages, the engine's memory among them, to the log of the replica."""
    ours = logging.getLogger("llava_ray")
    ours.setLevel(logging.INFO)
    for handler in logging.getLogger("ray.serve").handlers:
        if handler not in ours.handlers:
            ours.addHandler(handler)


class ModelDeployment(AdapterMethods, StreamMethods):
    """A replica of a model on a Ray worker."""

    async def __init__(self, source: ModelSource, settings: ServeSettings) -> None:  # type: ignore[misc]
        """Load the model; Serve awaits this in the replica's own loop. Raises ModelError, ConfigError."""
        message_sizes.check_environment(_deployment_name(source))
        log_where_serve_does()
        self.engine = make_engine(source, settings)
        await self.engine.start()
        self.replica = Replica(self.engine, source, settings)
        self.bundles = ReplicaBundles(serve.get_replica_context().replica_id.unique_id)
        self.watchdog = start_watchdog()

    async def card(self) -> ModelCard:
        """Return the model's capabilities."""
        return self.replica.card()

    async def collect(self) -> tuple[str, list[Metric]]:
        """Return this replica's id and metrics."""
        return serve.get_replica_context().replica_id.unique_id, self.replica.collect()

    async def check_health(self) -> None:
        """Check that the engine can still answer. Raises ModelError."""
        self.replica.check_health()

    async def __del__(self) -> None:
        """Free the model."""
        await self.engine.stop()
        self.replica.decoder.close()  # last: if loading failed there is no replica


@serve.ingress()
class Ingress:
    """The ingress: HTTP API, page, or both, over handles to the models."""

    def __init__(
        self,
        settings: ServeSettings,
        keys: Sequence[ApiKey],
        handles: Mapping[str, DeploymentHandle] | None,
        *,
        with_api: bool,
        with_page: bool,
        service_id: str = "",
    ) -> None:
        """Initialise with a handle per model name; without them use the application ``settings.api_app``.

        ``service_id`` is the same for all ingresses of one service, also after a restart.
        """
        message_sizes.check_environment("api" if with_api else "page")
        self.with_api, self.with_page = with_api, with_page
        if handles is None:
            handles = {source.name: _handle_elsewhere(source, settings) for source in settings.sources}
        handles_of = {source: handles[source.name] for source in settings.sources}
        self.gateway = traced(ServeGateway(handles_of, settings, service_id), settings.mlflow_tracking_uri)
        self.fronts: DeploymentHandle | None = None
        self.front = Front(self.gateway, settings, keys, collect=self.collect_all)
        self.watchdog = start_watchdog()

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Build the ASGI app."""
        return build_front(self.front, with_api=self.with_api, with_page=self.with_page)

    async def collect(self) -> tuple[str, list[Metric]]:
        """Return this process's id and metrics."""
        return serve.get_replica_context().replica_id.unique_id, self.front.metrics.collect()

    async def collect_all(self) -> dict[str, list[Metric]]:
        """Return the metrics of all replicas and of all ingress processes."""
        if self.fronts is None:  # a handle keeps a router: one is enough
            here = serve.get_replica_context()
            self.fronts = serve.get_deployment_handle(here.deployment, here.app_name)
        return {**await self.gateway.collect(), **await collect_metrics(self.fronts)}


def app(args: dict[str, Any]) -> Application:
    """Build API and page in one ingress of one replica: ``serve run llava_ray.deployments:app model=PATH``."""
    return _application(args, with_api=True, with_page=True)


def api(args: dict[str, Any]) -> Application:
    """Build the API alone, with ingresses that scale."""
    return _application(args, with_api=True, with_page=False)


def page(args: dict[str, Any]) -> Application:
    """Build the page alone, in one replica, over the models of an ``api`` application."""
    return _application(args, with_api=False, with_page=True)


def _application(args: dict[str, Any], *, with_api: bool, with_page: bool) -> Application:
    """Bind ingress and models. Raises ConfigError for settings, keys or paths that cannot be used."""
    settings = with_absolute_paths(ServeSettings.parsed(args))
    message_sizes.check_sizes(settings)
    keys = read_api_keys(settings.api_keys_file)
    check_admin_keys(settings.admin_keys, keys)
    page_only = with_page and not with_api
    models = None if page_only else {source.name: _model_deployment(source, settings) for source in settings.sources}
    ingress = serve.deployment(Ingress, name="page" if page_only else "api").options(
        ray_actor_options={"num_cpus": INGRESS_CPUS, "runtime_env": _RUNTIME_ENV},
        max_ongoing_requests=_INGRESS_CALLS,
        graceful_shutdown_timeout_s=settings.drain_timeout_s,
        graceful_shutdown_wait_loop_s=0.5,
        **_HEALTH,
        **(
            {"num_replicas": 1}  # the page's queue and sessions live in one process
            if with_page
            else _scaling(settings, settings.min_ingress_replicas, settings.max_ingress_replicas, _CALLS_PER_INGRESS)
        ),
    )
    bound: Application = ingress.bind(
        settings, keys, models, with_api=with_api, with_page=with_page, service_id=uuid.uuid4().hex
    )
    return bound


def _model_deployment(source: ModelSource, settings: ServeSettings) -> Application:
    """Bind one model."""
    resources: dict[str, Any] = {
        "num_cpus": settings.num_cpus,
        "num_gpus": settings.num_gpus,
        "runtime_env": _RUNTIME_ENV,
    }
    if settings.accelerator_type is not None:
        resources["accelerator_type"] = settings.accelerator_type
    deployment = serve.deployment(ModelDeployment, name=_deployment_name(source)).options(
        ray_actor_options=resources,
        max_ongoing_requests=settings.max_num_seqs + settings.max_queued_requests + _SPARE_CALLS,
        graceful_shutdown_timeout_s=settings.drain_timeout_s,
        graceful_shutdown_wait_loop_s=0.5,
        request_router_config=RequestRouterConfig(request_router_class=SessionRouter),
        **_HEALTH,
        **_scaling(settings, settings.min_replicas, settings.max_replicas, settings.target_ongoing_requests),
    )
    bound: Application = deployment.bind(source, settings)
    return bound


def _deployment_name(source: ModelSource) -> str:
    """Return the name of a model's deployment."""
    return f"model-{source.name}"


def _handle_elsewhere(source: ModelSource, settings: ServeSettings) -> DeploymentHandle:
    """Return a handle to another application's model; Serve restarts this replica until it exists."""
    return serve.get_deployment_handle(_deployment_name(source), settings.api_app)


def _scaling(settings: ServeSettings, minimum: int, maximum: int, target: float) -> dict[str, Any]:
    """Return the options for the number of replicas: fixed, or autoscaled between bounds."""
    if minimum == maximum:
        return {"num_replicas": minimum}
    return {
        "autoscaling_config": AutoscalingConfig(
            min_replicas=minimum,
            initial_replicas=max(1, minimum),
            max_replicas=maximum,
            target_ongoing_requests=target,
            upscale_delay_s=settings.upscale_delay_s,
            downscale_delay_s=settings.downscale_delay_s,
            # Serve's replicas report their metrics every 10 s, and the look-back period must be longer.
            look_back_period_s=max(11.0, settings.upscale_delay_s),
        )
    }


def with_absolute_paths(settings: ServeSettings) -> ServeSettings:
    """Make existing relative paths absolute: replicas have other working directories."""

    def absolute(text: str) -> str:
        name, at, path = text.rpartition("@")
        plain = path.partition("?")[0]
        return f"{name}{at}{Path(path).resolve()}" if plain and Path(plain).exists() else text

    return settings.replaced(
        {
            "model": tuple(map(absolute, settings.model)),
            "adapters": tuple(map(absolute, settings.adapters)),
            "allowed_adapter_paths": tuple(map(absolute, settings.allowed_adapter_paths)),
            "page_examples": settings.page_examples and absolute(settings.page_examples),
        }
    )
