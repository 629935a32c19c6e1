"""Routes of a service, a module for each group, and its applications: one for clients, one for its admin port."""

from __future__ import annotations

from fastapi import FastAPI

from twotower.serve.routes.admin import add_admin_routes
from twotower.serve.routes.answers import add_client_routes
from twotower.serve.routes.console import add_console_routes
from twotower.serve.routes.errors import add_error_replies
from twotower.serve.routes.openapi import JsonRoute, accept_any_id, add_openapi
from twotower.serve.routes.operation import add_operation_routes
from twotower.serve.service import Service
from twotower.version import __version__


def create_app(service: Service) -> FastAPI:
    """Return the application for clients, without the middleware."""
    app = FastAPI(
        title="twotower",
        version=__version__,
        description="Items for a user, from a published bundle. Every error is application/problem+json (RFC 9457).",
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,
        strict_content_type=False,  # the middleware has checked the content type
        openapi_tags=[
            {"name": "answers", "description": "Recommendations, vectors and the current bundle."},
            {"name": "events", "description": "Recent events of users."},
            {"name": "operation", "description": "Health and metrics, for operators."},
            {"name": "console", "description": "Data of the console at /. Absent without the setting console."},
        ],
    )
    app.router.route_class = JsonRoute
    add_error_replies(app, service)
    add_client_routes(app, service)
    add_operation_routes(app, service)
    if service.settings.console:
        add_console_routes(app, service)
    accept_any_id(app)
    add_openapi(app)
    return app


def create_admin_app(service: Service) -> FastAPI:
    """Return the application of the admin port."""
    app = FastAPI(
        title="twotower admin", version=__version__, docs_url=None, redoc_url=None, openapi_url=None,
        redirect_slashes=False, strict_content_type=False,
    )  # fmt: skip
    app.router.route_class = JsonRoute
    add_error_replies(app, service)
    add_admin_routes(app, service)
    accept_any_id(app)
    return app
