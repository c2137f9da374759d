"""Limits of gRPC messages: a request with its images goes to its replica as one message."""

import os

from llava_ray.deployments.settings import ServeSettings
from llava_ray.errors import ConfigError

# The variable of Serve's limit, read at the start of both processes. Its default is gRPC's, 4 MiB.
GRPC_SIZE_VARIABLE = "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH"
MAX_MESSAGE_BYTES = 2**31 - 1  # gRPC counts in 32 bits

# Of a received body; a task repeats it, images in base64 and markers with a few more characters.
_MAX_REQUEST_BYTES = 2**30


def check_sizes(settings: ServeSettings) -> None:
    """Check that the largest body, of the API or the page, fits one message. Raises ConfigError."""
    if settings.max_body_bytes > _MAX_REQUEST_BYTES:
        raise ConfigError(
            f"max_body_bytes = {settings.max_body_bytes:,}: a request goes to its replica whole, "
            f"{_MAX_REQUEST_BYTES:,} bytes are the most; lower max_body_bytes"
        )


def check_environment(name: str) -> None:
    """Check that the process of deployment ``name`` was started with our limit. Raises ConfigError."""
    if os.environ.get(GRPC_SIZE_VARIABLE) == str(MAX_MESSAGE_BYTES):
        return
    raise ConfigError(
        f"deployment {name!r}: {GRPC_SIZE_VARIABLE} is {os.environ.get(GRPC_SIZE_VARIABLE)!r} in its process, expected "
        f"{MAX_MESSAGE_BYTES}: images over 4 MiB would not reach a model. A Serve file's own ray_actor_options or "
        "runtime_env of a deployment replace those of the application; give num_cpus, num_gpus and accelerator_type "
        "as args instead, or repeat the variable there"
    )
