"""The ASGI app of an ingress: the API's routes, the page, and their middleware."""

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware
from starlette.exceptions import HTTPException

from llava_ray.deployments.http.api_description.docs_page import add_docs
from llava_ray.deployments.http.middleware import AuthMiddleware, BodyMiddleware, OpenRequestsMiddleware
from llava_ray.deployments.http.routes import SESSION_HEADER, Front, add_api, add_health
from llava_ray.deployments.refusal import RefusalError


def build_front(front: Front, *, with_api: bool = True, with_page: bool = False) -> FastAPI:
    """Build the app, independent of Ray."""
    # No redirects from and to a slash: their address would be built from the Host header.
    app = FastAPI(title="llava_ray", docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    add_health(app, front)
    if with_api:
        add_api(app, front)
        if front.settings.api_docs:
            add_docs(app, front)
    app.add_exception_handler(RefusalError, front.on_refusal)
    app.add_exception_handler(HTTPException, front.on_http_error)
    app.add_exception_handler(Exception, front.on_unhandled_error)
    settings, on_refused = front.settings, front.count_refused
    # The last middleware added is the outermost: size and rate limits apply before a body is read.
    app.add_middleware(
        BodyMiddleware, settings.max_body_bytes, settings.body_timeout_s, front.bytes_in_flight, on_refused
    )
    app.add_middleware(AuthMiddleware, front.guard, on_refused, api_docs=settings.api_docs)
    if with_page:
        from llava_ray.deployments.chat_page.page import (
            mount_page,  # Gradio takes seconds to import, and not every service has the page
        )

        mount_page(app, front)
    app.add_middleware(OpenRequestsMiddleware, front.open_requests, settings.trusted_proxies, on_refused)
    app.add_middleware(  # without origins too: Gradio would otherwise let every one into the page
        CORSMiddleware,
        allow_origins=settings.cors_allowed_origins,
        allow_methods=["GET", "POST"],
        allow_headers=["authorization", "content-type", SESSION_HEADER],
    )
    return app
