"""The Ray Serve applications: ``app`` is API and page in one ingress, ``api`` and ``page`` are separate (clusters)."""

from llava_ray.deployments.applications import api, app, page

__all__ = ["api", "app", "page"]
