"""The page."""

from fastapi import FastAPI

from llava_ray.deployments.routes import Front


def mount_page(app: FastAPI, front: Front) -> None:
    """Mount the page."""
