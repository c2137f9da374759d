"""The engines of a service, by their names in the settings."""

import importlib
from collections.abc import Callable
from typing import Any

from llava_ray.deployments.model_source import ModelSource
from llava_ray.deployments.settings import ServeSettings
from llava_ray.errors import ConfigError
from llava_ray.generate.engine import Engine

# Functions of a ModelSource and ServeSettings, imported on demand: each needs libraries that the others do not.
_ENGINES = {
    "builtin": "llava_ray.deployments.builtin:make_engine",
    "vllm": "llava_ray.deployments.vllm:make_engine",
}


def make_engine(source: ModelSource, settings: ServeSettings) -> Engine:
    """Build the engine of one replica, not started. Raises ConfigError for an unknown name."""
    place = _ENGINES.get(settings.engine, settings.engine)
    module, colon, function = place.partition(":")
    if not colon:
        raise ConfigError(
            f"engine {settings.engine!r}: expected one of {', '.join(map(repr, _ENGINES))}, or 'module:function'"
        )
    try:
        make: Callable[..., Any] = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"engine {settings.engine!r}: {error}; install it, or choose another engine") from error
    engine: Engine = make(source, settings)
    return engine
