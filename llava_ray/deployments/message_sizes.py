"""How large a task may be: a request crosses to its replica as one gRPC message, with its images in it."""

import os

from llava_ray.deployments.settings import ServeSettings
from llava_ray.errors import ConfigError

# What Serve takes the limit from, in the processes of both ends when they start. Its default is gRPC's, 4 MiB.
VARIABLE = "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH"
MAX_MESSAGE_BYTES = 2**31 - 1  # gRPC counts in 32 bits

# Of what was received; a task repeats it, images in base64 and markers with a few more characters than before.
_MAX_REQUEST_BYTES = 2**30


def check_sizes(settings: ServeSettings) -> None:
    """Raise ConfigError for a body, from the API or a chat of the page, that is more than one message can hold."""
    if settings.max_body_bytes > _MAX_REQUEST_BYTES:
        raise ConfigError(
            f"max_body_bytes = {settings.max_body_bytes:,}: a request goes to its replica whole, "
            f"{_MAX_REQUEST_BYTES:,} bytes are the most; lower max_body_bytes"
        )


def check_environment(name: str) -> None:
    """Raise ConfigError in a process of deployment ``name`` that was started without our limit."""
    if os.environ.get(VARIABLE) == str(MAX_MESSAGE_BYTES):
        return
    raise ConfigError(
        f"deployment {name!r}: {VARIABLE} is {os.environ.get(VARIABLE)!r} in its process, expected "
        f"{MAX_MESSAGE_BYTES}: images over 4 MiB would not reach a model. A Serve file's own ray_actor_options or "
        "runtime_env of a deployment replace those of the application; give num_cpus, num_gpus and accelerator_type "
        "as args instead, or repeat the variable there"
    )
