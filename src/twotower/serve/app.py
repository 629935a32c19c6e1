"""Routes of the service and of its admin port. service.py answers them; schemas.py defines bodies and replies."""

from __future__ import annotations

import logging
import re
from importlib import resources
from json import dumps
from pathlib import Path
from typing import Annotated, Any

import orjson
from fastapi import FastAPI, Query
from fastapi import Path as InPath
from fastapi import Request as HttpRequest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import PlainTextResponse, Response
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException as StarletteHTTPException

import twotower
from twotower.errors import BundleError, DataError, RunError, Unavailable
from twotower.index.milvus.collections import MilvusCollections
from twotower.serve import schemas
from twotower.serve.console import Console
from twotower.serve.metrics import CONTENT_TYPE
from twotower.serve.problems import PROBLEMS, Problem, index_problem, problem_of
from twotower.serve.service import Service
from twotower.store.store import Store

log = logging.getLogger("twotower.app")

CONTENT_TYPES = {".html": "text/html; charset=utf-8", ".css": "text/css; charset=utf-8", ".js": "text/javascript; charset=utf-8",
         ".svg": "image/svg+xml"}  # fmt: skip
CONTENT_SECURITY_POLICY = (
    "default-src 'self'; img-src 'self' data:; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
)

PathId = Annotated[str, InPath(min_length=1, max_length=schemas.MAX_ID_LENGTH, description="Any id, percent-encoded.")]
QueryId = Annotated[str, Query(min_length=1, max_length=schemas.MAX_ID_LENGTH, description="Any id, percent-encoded.")]
ItemCount = Annotated[int, Query(description="Number of items. At most limits.k of GET /v1/bundle.")]
QueryText = Annotated[str, Query(max_length=schemas.MAX_ID_LENGTH, description="Text to find. Empty: all.")]
GroupColumn = Annotated[
    str, Query(max_length=schemas.MAX_ID_LENGTH, description="Item column that groups the points. Empty: the first.")
]
RowLimit = Annotated[int, Query(ge=1, le=200, description="Greatest number of results.")]
PointLimit = Annotated[int, Query(ge=1, le=20_000, description="Greatest number of points.")]
BundleId = Annotated[str, Query(max_length=64, description="Bundle id. Empty: the current bundle.")]


class _HttpRequest(HttpRequest):
    async def json(self) -> Any:
        """Parse the body with orjson, which refuses NaN, lone surrogates and deep nesting."""
        return orjson.loads(await self.body())


class _Route(APIRoute):
    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        # An id may contain any character: without DOTALL `.` matches no line feed, and `$` also matches before a final one.
        self.path_regex = re.compile(self.path_regex.pattern.removesuffix("$") + r"\Z", re.DOTALL)

    def get_route_handler(self) -> Any:
        handle = super().get_route_handler()

        async def with_orjson(request: HttpRequest) -> Response:
            return await handle(_HttpRequest(request.scope, request.receive))

        return with_orjson


def json_response(value: Any, status: int = 200) -> Response:
    return Response(orjson.dumps(value), status, media_type="application/json")


def _problems(*names: str) -> dict[int | str, dict[str, Any]]:
    """Return the `responses` of a route for clients, with the problems of every such route."""
    return _responses(*names, "unauthorized", "foreign-origin", "rate-limit", "overload")


def _responses(*names: str) -> dict[int | str, dict[str, Any]]:
    found: dict[int | str, dict[str, Any]] = {}
    for name in names:
        status, title, _ = PROBLEMS[name]
        before = found.get(status, {}).get("description")
        found[status] = {
            "description": f"{before}; {title}" if before else title,
            "content": {"application/problem+json": {"schema": {"$ref": "#/components/schemas/ProblemReply"}}},
        }
    return found


BODY_PROBLEMS = ("malformed", "too-large", "unsupported-media-type", "body-timeout", "invalid", "no-bundle")


def create_app(service: Service) -> FastAPI:
    """Return the application for clients, without the middleware."""
    app = FastAPI(
        title="twotower",
        version=twotower.__version__,
        description="Items for a user, from a published bundle. Every error is application/problem+json (RFC 9457).",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        strict_content_type=False,  # the middleware has checked the content type
        openapi_tags=[
            {"name": "answers", "description": "Recommendations, vectors and the current bundle."},
            {"name": "events", "description": "Recent events of users."},
            {"name": "operation", "description": "Health and metrics, for operators."},
            {"name": "console", "description": "Data of the console at /. Absent without the setting console."},
        ],
    )
    app.router.route_class = _Route
    _handle_errors(app, service)

    @app.post(
        "/v1/recommend",
        response_model=schemas.ItemsReply,
        responses=_problems(*BODY_PROBLEMS, "unknown-user", "index-unavailable"),
        tags=["answers"],
    )
    async def recommend(body: schemas.RecommendRequest) -> Any:
        """Recommend items to a user, known or described by the request."""
        return json_response(await service.recommend(body))

    @app.post(
        "/v1/recommend:batch", response_model=schemas.BatchReply, responses=_problems(*BODY_PROBLEMS), tags=["answers"]
    )
    async def recommend_batch(body: schemas.BatchRequest, request: HttpRequest) -> Any:
        """Answer several requests. An invalid one gets a problem in its place."""
        return json_response(await service.batch(body, request.is_disconnected))

    @app.post(
        "/v1/embed/user",
        response_model=schemas.VectorReply,
        responses=_problems(*BODY_PROBLEMS, "unknown-user"),
        tags=["answers"],
    )
    async def embed_user(body: schemas.UserRequest) -> Any:
        """Return the vector of a user."""
        return json_response(await service.embed(body))

    @app.get(
        "/v1/items/{item_id:path}/similar", response_model=schemas.ItemsReply,
        responses=_problems("unknown-item", "not-found", "invalid", "no-bundle", "index-unavailable"), tags=["answers"],
    )  # fmt: skip
    async def similar(item_id: PathId, k: ItemCount = 10) -> Any:
        """Return the items with the most similar vectors. Scores are cosines."""
        return json_response(await service.similar(item_id, k))

    @app.get(
        "/v1/items/similar", response_model=schemas.ItemsReply,
        responses=_problems("unknown-item", "invalid", "no-bundle", "index-unavailable"), tags=["answers"],
    )  # fmt: skip
    async def similar_by_query(item_id: QueryId, k: ItemCount = 10) -> Any:
        """Return similar items, with the id in the query: clients remove `.` and `..` from a path."""
        return await similar(item_id, k)

    @app.post(
        "/v1/search",
        response_model=schemas.ItemsReply,
        responses=_problems(*BODY_PROBLEMS, "no-text-feature", "index-unavailable"),
        tags=["answers"],
    )
    async def search(body: schemas.SearchRequest) -> Any:
        """Recommend items for a text."""
        return json_response(await service.search(body))

    @app.post(
        "/v1/events",
        response_model=schemas.EventsReply,
        status_code=202,
        responses=_problems(*BODY_PROBLEMS, "conflict"),
        tags=["events"],
    )
    async def add_events(body: schemas.EventsRequest) -> Any:
        """Append to a user's recent events, which the next answer uses."""
        return json_response(await service.add_events(body), 202)

    @app.delete(
        "/v1/events/{user_id:path}",
        status_code=204,
        responses=_problems("not-found", "no-bundle", "event-store"),
        tags=["events"],
    )
    async def forget(user_id: PathId) -> Response:
        """Delete a user's recent events."""
        await service.forget(user_id)
        return Response(status_code=204)

    @app.delete(
        "/v1/events", status_code=204, responses=_problems("invalid", "no-bundle", "event-store"), tags=["events"]
    )
    async def forget_by_query(user_id: QueryId) -> Response:
        """Delete a user's recent events, with the id in the query: clients remove `.` and `..` from a path."""
        return await forget(user_id)

    @app.get("/v1/bundle", response_model=schemas.BundleReply, responses=_problems("no-bundle"), tags=["answers"])
    async def bundle() -> Any:
        """Describe the current bundle and the limits of requests."""
        return json_response(service.describe())

    @app.get("/livez", response_model=schemas.HealthReply, tags=["operation"])
    async def livez() -> Any:
        """Answer 200 while the process runs."""
        return json_response({"status": "ok", "bundle_id": _bundle_id(service)})

    @app.get(
        "/readyz", response_model=schemas.HealthReply, responses=_responses("draining", "no-bundle"), tags=["operation"]
    )
    async def readyz() -> Any:
        """Answer 200 while the process should get requests."""
        if service.draining:
            raise Problem("draining")
        return json_response({"status": "ok", "bundle_id": service.bundles.current.bundle.id})

    @app.get(
        "/metrics",
        response_class=PlainTextResponse,
        responses=_responses("unauthorized", "foreign-origin"),
        tags=["operation"],
    )
    async def metrics() -> Response:
        """Return metrics for Prometheus."""
        return Response(service.metrics.render(), media_type=CONTENT_TYPE)

    @app.get(
        "/problems/{name}", response_class=PlainTextResponse, responses=_responses("not-found"), tags=["operation"]
    )
    async def problem(name: Annotated[str, InPath(max_length=64, description="Name of the problem.")]) -> Response:
        """Explain a problem and what to do about it."""
        if name not in PROBLEMS:
            raise Problem("not-found")
        status, title, what_to_do = PROBLEMS[name]
        return Response(f"{status} {title}\n\n{what_to_do}\n", media_type="text/plain")

    if service.settings.console:
        _console(app, service)
    _describe_problems(app)
    return app


def _console(app: FastAPI, service: Service) -> None:
    console = Console(service)
    responses = _problems("invalid", "no-bundle")
    of_a_bundle = _problems("invalid", "unknown-bundle", "no-bundle", "index-unavailable")
    folder = resources.files("twotower.serve") / "page"
    files = {
        f.name: (f.read_bytes(), CONTENT_TYPES[suffix])
        for f in folder.iterdir()
        if (suffix := Path(f.name).suffix) in CONTENT_TYPES
    }

    def page(name: str) -> Response:
        headers = {"Content-Security-Policy": CONTENT_SECURITY_POLICY, "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer",
                   "Cache-Control": "no-cache"}  # fmt: skip
        content, kind = files[name]
        return Response(content, media_type=kind, headers=headers)

    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        return page("index.html")

    @app.get("/page/{name}", include_in_schema=False)
    async def part(name: str) -> Response:
        if name not in files:
            raise Problem("not-found")
        return page(name)

    @app.get("/v1/console/users", responses=responses, tags=["console"])
    async def users(query: QueryText = "", limit: RowLimit = 20) -> Any:
        """Find users by id: those that begin with the text first, then those that contain it."""
        with console.slot():
            return json_response(await console.users(query, limit))

    @app.get(
        "/v1/console/users/{user_id:path}",
        responses=_problems("unknown-user", "not-found", "no-bundle"),
        tags=["console"],
    )
    async def user(user_id: PathId) -> Any:
        """Return a user's features, history and recent events."""
        with console.slot():
            return json_response(await console.user(user_id))

    @app.get("/v1/console/user", responses=_problems("unknown-user", "invalid", "no-bundle"), tags=["console"])
    async def user_by_query(user_id: QueryId) -> Any:
        """Return a user, with the id in the query: clients remove `.` and `..` from a path."""
        return await user(user_id)

    @app.get("/v1/console/items", responses=responses, tags=["console"])
    async def items(query: QueryText = "", limit: RowLimit = 20) -> Any:
        """Find items: the one with this id first, then those whose title contains the text."""
        with console.slot():
            return json_response(await console.items(query, limit))

    @app.get("/v1/console/map", responses=of_a_bundle, tags=["console"])
    async def item_map(column: GroupColumn = "", limit: PointLimit = 4_000, bundle: BundleId = "") -> Any:
        """Project item vectors to their first two principal components."""
        with console.slot():
            return json_response(await console.map(column, limit, bundle))

    @app.post(
        "/v1/console/explain",
        responses=_problems(*BODY_PROBLEMS, "unknown-bundle", "index-unavailable"),
        tags=["console"],
    )
    async def explain(body: schemas.RecommendRequest, bundle: BundleId = "") -> Any:
        """Return an answer with its history, excluded items, gates, and the user's point on the map."""
        with console.slot():
            return json_response(await console.explain(body, bundle))

    @app.get("/v1/console/bundles", responses=_problems("bundle-store"), tags=["console"])
    async def bundles() -> Any:
        """List the bundles of the store."""
        with console.slot():
            return json_response(await console.bundles())


def create_admin_app(service: Service) -> FastAPI:
    """Return the application of the admin port."""
    app = FastAPI(
        title="twotower admin", version=twotower.__version__, docs_url=None, redoc_url=None, openapi_url=None,
        redirect_slashes=False, strict_content_type=False,
    )  # fmt: skip
    app.router.route_class = _Route
    _handle_errors(app, service)

    @app.get("/v1/bundles")
    async def bundles() -> Any:
        """List the bundles of the store and its latest 100 changes."""
        history = await service.bundles.with_store(lambda store: store.history()[-100:])
        # A reason from a shell may contain lone surrogates, which are not UTF-8.
        text = dumps(history, ensure_ascii=False).encode(errors="replace")
        return json_response(await Console(service).bundles() | {"history": orjson.loads(text)})

    @app.post("/v1/rollback")
    async def rollback(body: schemas.RollbackRequest) -> Any:
        """Make an earlier bundle current; every worker loads it at its next poll."""
        reason = body.reason or "rollback by the admin port"
        try:
            bundle = await service.bundles.with_store(
                lambda store: store.rollback(body.to or None, reason=reason), service.bundles.limits.load_timeout
            )
        except RunError as e:
            if _is_silent(e):
                raise
            raise Problem("conflict", service.bundles.public_message(e)) from None
        try:
            await service.bundles.with_store(lambda store: MilvusCollections(store).update_alias())
        except RunError as e:
            log.warning("the Milvus alias was not updated", extra={"fields": {"detail": str(e)}})
        await service.bundles.refresh()
        return json_response({"current": bundle.id, "serving": _bundle_id(service)})

    @app.post("/v1/reload")
    async def reload() -> Any:
        """Load the current bundle again, also if it was refused; in every worker, if the store can be written."""
        try:
            await service.bundles.with_store(Store.touch_current)
        except RunError as e:
            if _is_silent(e):
                raise
        await service.bundles.refresh(retry=True)
        return json_response({"serving": _bundle_id(service), "refused": service.bundles.last_error})

    return app


def _is_silent(error: RunError) -> bool:
    """Return True for the error of a store that does not answer."""
    return isinstance(error, BundleError) and error.reason == "store"


def _bundle_id(service: Service) -> str | None:
    return service.bundles.retriever.bundle.id if service.bundles.retriever else None


def _handle_errors(app: FastAPI, service: Service) -> None:
    def answer(problem: Problem, request: HttpRequest) -> Response:
        body = problem.body(request.scope.get("request_id", ""))
        return Response(body, problem.status, problem.headers, "application/problem+json")

    async def problem(request: HttpRequest, error: Any) -> Response:
        return answer(error, request)

    async def data_error(request: HttpRequest, error: Any) -> Response:
        return answer(problem_of(error), request)

    async def unavailable(request: HttpRequest, error: Any) -> Response:
        return answer(index_problem(), request)

    async def store_error(request: HttpRequest, error: Any) -> Response:
        return answer(
            Problem("bundle-store", service.bundles.public_message(error), headers={"Retry-After": "5"}), request
        )

    async def invalid(request: HttpRequest, error: Any) -> Response:
        found = error.errors()
        if any(e["type"] == "json_invalid" for e in found):
            cause = found[0].get("ctx", {}).get("error", "")
            return answer(Problem("malformed", f"the body is not JSON in UTF-8: {cause}" if cause else ""), request)
        errors = [{"at": ".".join(map(str, e["loc"])), "detail": _error_text(e)} for e in found[:20]]
        detail = "; ".join(f"{e['at']}: {e['detail']}" for e in errors[:3])
        return answer(Problem("invalid", detail, errors=errors), request)

    async def http_error(request: HttpRequest, error: Any) -> Response:
        name = {400: "malformed", 404: "not-found", 405: "method-not-allowed"}.get(error.status_code, "internal-error")
        return answer(Problem(name, headers=error.headers), request)

    app.add_exception_handler(Problem, problem)
    app.add_exception_handler(DataError, data_error)
    app.add_exception_handler(Unavailable, unavailable)
    app.add_exception_handler(BundleError, store_error)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(StarletteHTTPException, http_error)


def _error_text(error: Any) -> str:
    """Return the message of a validation error; for a field that was renamed, its new name."""
    old = error["loc"][-1]
    if error["type"] == "extra_forbidden" and old in schemas.RENAMED_FIELDS:
        return f"'{old}' is renamed to '{schemas.RENAMED_FIELDS[old]}'"
    return str(error["msg"])


def _describe_problems(app: FastAPI) -> None:
    """Replace FastAPI's own error schemas in the OpenAPI document by that of a problem."""
    generate = app.openapi

    def openapi() -> dict[str, Any]:
        if not app.openapi_schema:
            schema = generate()
            components = schema["components"]["schemas"]
            components.setdefault("ProblemReply", schemas.ProblemReply.model_json_schema())
            for name in ("HTTPValidationError", "ValidationError"):
                components.pop(name, None)
            for operations in schema["paths"].values():
                for operation in operations.values():
                    replies = operation["responses"]
                    if "application/json" in replies.get("422", {}).get("content", {}):
                        replies["422"] = _responses("invalid")[422]
        return app.openapi_schema or {}

    app.openapi = openapi  # type: ignore[method-assign]
