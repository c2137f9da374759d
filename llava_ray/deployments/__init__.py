"""The Ray Serve applications: ``app`` is API and page in one ingress, ``api`` and ``page`` are separate (clusters)."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llava_ray.deployments.applications import api, app, page

__all__ = ["api", "app", "page"]


def __getattr__(name: str) -> Any:
    """Import the applications when they are asked for: their settings are read without Ray, which takes seconds."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from llava_ray.deployments import applications

    return getattr(applications, name)
