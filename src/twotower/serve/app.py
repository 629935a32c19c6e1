"""The routes. What they do is in service.py, what travels in wire.py."""

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
from twotower.bundle import BundleError
from twotower.errors import DataError, RunError, Unavailable
from twotower.index.milvus.collections import MilvusCollections
from twotower.serve import schemas
from twotower.serve.console import Console
from twotower.serve.metrics import CONTENT_TYPE
from twotower.serve.problems import PROBLEMS, Problem
from twotower.serve.service import Service, index_problem, problem_of
from twotower.store import Store

log = logging.getLogger("twotower.app")

CONTENT_TYPES = {".html": "text/html; charset=utf-8", ".css": "text/css; charset=utf-8", ".js": "text/javascript; charset=utf-8",
         ".svg": "image/svg+xml"}  # fmt: skip
CONTENT_SECURITY_POLICY = (
    "default-src 'self'; img-src 'self' data:; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
)

PathId = Annotated[str, InPath(min_length=1, max_length=schemas.MAX_ID_LENGTH)]
QueryId = Annotated[str, Query(min_length=1, max_length=schemas.MAX_ID_LENGTH, description="any id, percent-encoded")]
ItemCount = Annotated[int, Query(description="how many")]
QueryText = Annotated[str, Query(max_length=schemas.MAX_ID_LENGTH)]
RowLimit = Annotated[int, Query(ge=1, le=200)]
BundleId = Annotated[str, Query(max_length=64, description="another bundle of the store; the current one if empty")]


class _HttpRequest(HttpRequest):
    async def json(self) -> Any:
        """By orjson, which takes no NaN, no half characters and no endless nesting."""
        return orjson.loads(await self.body())


class _Route(APIRoute):
    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        # An id may hold any character; `.` would match none that ends a line, and `$` would leave the last one out.
        self.path_regex = re.compile(self.path_regex.pattern.removesuffix("$") + r"\Z", re.DOTALL)

    def get_route_handler(self) -> Any:
        handle = super().get_route_handler()

        async def with_orjson(request: HttpRequest) -> Response:
            return await handle(_HttpRequest(request.scope, request.receive))

        return with_orjson


def json_response(value: Any, status: int = 200) -> Response:
    return Response(orjson.dumps(value), status, media_type="application/json")


def _problems(*names: str) -> dict[int | str, dict[str, Any]]:
    """The `responses` of a route that answers clients."""
    return _responses(*names, "no-key", "origin", "rate", "overload")


def _responses(*names: str) -> dict[int | str, dict[str, Any]]:
    found: dict[int | str, dict[str, Any]] = {}
    for name in names:
        status, title, _ = PROBLEMS[name]
        said = found.get(status, {}).get("description")
        found[status] = {
            "description": f"{said}; {title}" if said else title,
            "content": {"application/problem+json": {"schema": {"$ref": "#/components/schemas/ProblemReply"}}},
        }
    return found


BODY_PROBLEMS = ("malformed", "too-large", "media-type", "slow", "invalid", "no-bundle")


def create_app(service: Service) -> FastAPI:
    """The application that answers clients, without the door."""
    app = FastAPI(
        title="twotower",
        version=twotower.__version__,
        description="The best items for a user, from a published bundle. Every error is application/problem+json (RFC 9457).",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        strict_content_type=False,  # the door has looked at it
        openapi_tags=[
            {"name": "answers", "description": "What a client asks for."},
            {"name": "events", "description": "What users do now."},
            {"name": "operation", "description": "For those who run the service."},
            {"name": "console", "description": "What the page at / asks; only there without --no-console."},
        ],
    )
    app.router.route_class = _Route
    _handle_errors(app, service)

    @app.post(
        "/v1/recommend",
        response_model=schemas.ItemsReply,
        responses=_problems(*BODY_PROBLEMS, "unknown-user", "index"),
        tags=["answers"],
    )
    async def recommend(body: schemas.RecommendRequest) -> Any:
        """The best items for a user, known or described."""
        return json_response(await service.recommend(body))

    @app.post(
        "/v1/recommend:batch", response_model=schemas.BatchReply, responses=_problems(*BODY_PROBLEMS), tags=["answers"]
    )
    async def recommend_batch(body: schemas.BatchRequest, request: HttpRequest) -> Any:
        """Several requests at once; a mistake in one is a problem in its place."""
        return json_response(await service.batch(body, request.is_disconnected))

    @app.post(
        "/v1/embed/user",
        response_model=schemas.VectorReply,
        responses=_problems(*BODY_PROBLEMS, "unknown-user"),
        tags=["answers"],
    )
    async def embed_user(body: schemas.UserRequest) -> Any:
        """The vector of a user."""
        return json_response(await service.embed(body))

    @app.get(
        "/v1/items/{item_id:path}/similar", response_model=schemas.ItemsReply,
        responses=_problems("unknown-item", "not-found", "invalid", "no-bundle", "index"), tags=["answers"],
    )  # fmt: skip
    async def similar(item_id: PathId, k: ItemCount = 10) -> Any:
        """The items whose vectors point most nearly the same way; scores are cosines."""
        return json_response(await service.similar(item_id, k))

    @app.get(
        "/v1/items/similar", response_model=schemas.ItemsReply,
        responses=_problems("unknown-item", "invalid", "no-bundle", "index"), tags=["answers"],
    )  # fmt: skip
    async def similar_to(item_id: QueryId, k: ItemCount = 10) -> Any:
        """The same, for ids that a path cannot hold: clients take the steps `.` and `..` out of it."""
        return await similar(item_id, k)

    @app.post(
        "/v1/search",
        response_model=schemas.ItemsReply,
        responses=_problems(*BODY_PROBLEMS, "no-text", "index"),
        tags=["answers"],
    )
    async def search(body: schemas.SearchRequest) -> Any:
        """The best items for a text."""
        return json_response(await service.search(body))

    @app.post(
        "/v1/events",
        response_model=schemas.EventsReply,
        status_code=202,
        responses=_problems(*BODY_PROBLEMS, "conflict"),
        tags=["events"],
    )
    async def add_events(body: schemas.EventsRequest) -> Any:
        """Append to a user's live history, which the next answer reads."""
        return json_response(await service.add_events(body), 202)

    @app.delete(
        "/v1/events/{user_id:path}",
        status_code=204,
        responses=_problems("not-found", "no-bundle", "event-store"),
        tags=["events"],
    )
    async def forget(user_id: PathId) -> Response:
        """Forget a user's live history."""
        await service.forget(user_id)
        return Response(status_code=204)

    @app.delete(
        "/v1/events", status_code=204, responses=_problems("invalid", "no-bundle", "event-store"), tags=["events"]
    )
    async def forget_whom(user_id: QueryId) -> Response:
        """The same, for ids that a path cannot hold: clients take the steps `.` and `..` out of it."""
        return await forget(user_id)

    @app.get("/v1/bundle", response_model=schemas.BundleReply, responses=_problems("no-bundle"), tags=["answers"])
    async def bundle() -> Any:
        """What answers, what a request may tell, and the limits."""
        return json_response(service.describe())

    @app.get("/livez", response_model=schemas.HealthReply, tags=["operation"])
    async def livez() -> Any:
        """Whether the process runs."""
        return json_response({"status": "ok", "bundle_id": _bundle_id(service)})

    @app.get(
        "/readyz", response_model=schemas.HealthReply, responses=_responses("draining", "no-bundle"), tags=["operation"]
    )
    async def readyz() -> Any:
        """Whether requests should be sent here."""
        if service.draining:
            raise Problem("draining")
        return json_response({"status": "ok", "bundle_id": service.bundles.current.bundle.id})

    @app.get("/metrics", response_class=PlainTextResponse, responses=_responses("no-key", "origin"), tags=["operation"])
    async def metrics() -> Response:
        """For Prometheus."""
        return Response(service.metrics.render(), media_type=CONTENT_TYPE)

    @app.get(
        "/problems/{name}", response_class=PlainTextResponse, responses=_responses("not-found"), tags=["operation"]
    )
    async def problem(name: Annotated[str, InPath(max_length=64)]) -> Response:
        """What a problem means, and what to do."""
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
    of_a_bundle = _problems("invalid", "unknown-bundle", "no-bundle", "index")
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
        """Users whose id begins with or holds the text."""
        with console.slot():
            return json_response(await console.users(query, limit))

    @app.get(
        "/v1/console/users/{user_id:path}",
        responses=_problems("unknown-user", "not-found", "no-bundle"),
        tags=["console"],
    )
    async def user(user_id: PathId) -> Any:
        """A user's features, history and live history."""
        with console.slot():
            return json_response(await console.user(user_id))

    @app.get("/v1/console/user", responses=_problems("unknown-user", "invalid", "no-bundle"), tags=["console"])
    async def user_of(user_id: QueryId) -> Any:
        """The same, for ids that a path cannot hold: clients take the steps `.` and `..` out of it."""
        return await user(user_id)

    @app.get("/v1/console/items", responses=responses, tags=["console"])
    async def items(query: QueryText = "", limit: RowLimit = 20) -> Any:
        """Items whose title holds the text, or of that id."""
        with console.slot():
            return json_response(await console.items(query, limit))

    @app.get("/v1/console/map", responses=of_a_bundle, tags=["console"])
    async def space(
        column: QueryText = "", limit: Annotated[int, Query(ge=1, le=20_000)] = 4_000, bundle: BundleId = ""
    ) -> Any:
        """Item vectors in the plane of their two principal directions."""
        with console.slot():
            return json_response(await console.map(column, limit, bundle))

    @app.post("/v1/console/explain", responses=_problems(*BODY_PROBLEMS, "unknown-bundle", "index"), tags=["console"])
    async def explain(body: schemas.RecommendRequest, bundle: BundleId = "") -> Any:
        """An answer with what led to it: history, filters, gates, the user's place among the items."""
        with console.slot():
            return json_response(await console.explain(body, bundle))

    @app.get("/v1/console/bundles", responses=_problems("store"), tags=["console"])
    async def bundles() -> Any:
        """The bundles of the store."""
        with console.slot():
            return json_response(await console.bundles())


def create_admin_app(service: Service) -> FastAPI:
    """The application of the admin port."""
    app = FastAPI(
        title="twotower admin", version=twotower.__version__, docs_url=None, redoc_url=None, openapi_url=None,
        redirect_slashes=False, strict_content_type=False,
    )  # fmt: skip
    app.router.route_class = _Route
    _handle_errors(app, service)

    @app.get("/v1/bundles")
    async def bundles() -> Any:
        """The bundles of the store, and what has been done with them."""
        history = await service.bundles.with_store(lambda store: store.history()[-100:])
        # A reason that a shell gave may hold half a character, which is no text.
        text = dumps(history, ensure_ascii=False).encode(errors="replace")
        return json_response(await Console(service).bundles() | {"history": orjson.loads(text)})

    @app.post("/v1/rollback")
    async def rollback(body: schemas.RollbackRequest) -> Any:
        """Make an earlier bundle current again; every worker takes it up within a moment."""
        reason = body.reason or "by the service's admin port"
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
            log.warning("the alias does not follow", extra={"fields": {"detail": str(e)}})
        await service.bundles.refresh()
        return json_response({"current": bundle.id, "serving": _bundle_id(service)})

    @app.post("/v1/reload")
    async def reload() -> Any:
        """Look again at what is current, also at a bundle that was refused; in every worker, if the store can be
        written to."""
        try:
            await service.bundles.with_store(Store.touch_current)
        except RunError as e:
            if _is_silent(e):
                raise
        await service.bundles.refresh(retry=True)
        return json_response({"serving": _bundle_id(service), "refused": service.bundles.last_error})

    return app


def _is_silent(error: RunError) -> bool:
    """Tell the error of a store that does not answer."""
    return isinstance(error, BundleError) and error.reason == "store"


def _bundle_id(service: Service) -> str | None:
    return service.bundles.retriever.bundle.id if service.bundles.retriever else None


def _handle_errors(app: FastAPI, service: Service) -> None:
    def answer(problem: Problem, request: HttpRequest) -> Response:
        body = problem.body(request.scope.get("request_id", ""))
        return Response(body, problem.status, problem.headers, "application/problem+json")

    async def known(request: HttpRequest, error: Any) -> Response:
        return answer(error, request)

    async def data(request: HttpRequest, error: Any) -> Response:
        return answer(problem_of(error), request)

    async def unavailable(request: HttpRequest, error: Any) -> Response:
        return answer(index_problem(), request)

    async def store(request: HttpRequest, error: Any) -> Response:
        return answer(Problem("store", service.bundles.public_message(error), headers={"Retry-After": "5"}), request)

    async def invalid(request: HttpRequest, error: Any) -> Response:
        found = error.errors()
        if any(e["type"] == "json_invalid" for e in found):
            told = found[0].get("ctx", {}).get("error", "")
            return answer(Problem("malformed", f"the body is not JSON in UTF-8: {told}" if told else ""), request)
        errors = [{"at": ".".join(map(str, e["loc"])), "detail": _error_text(e)} for e in found[:20]]
        detail = "; ".join(f"{e['at']}: {e['detail']}" for e in errors[:3])
        return answer(Problem("invalid", detail, errors=errors), request)

    async def plain(request: HttpRequest, error: Any) -> Response:
        name = {400: "malformed", 404: "not-found", 405: "method"}.get(error.status_code, "broken")
        return answer(Problem(name, headers=error.headers), request)

    app.add_exception_handler(Problem, known)
    app.add_exception_handler(DataError, data)
    app.add_exception_handler(Unavailable, unavailable)
    app.add_exception_handler(BundleError, store)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(StarletteHTTPException, plain)


def _error_text(error: Any) -> str:
    """Return the message of a validation error; for a field that was renamed, its new name."""
    old = error["loc"][-1]
    if error["type"] == "extra_forbidden" and old in schemas.RENAMED_FIELDS:
        return f"'{old}' is renamed to '{schemas.RENAMED_FIELDS[old]}'"
    return str(error["msg"])


def _describe_problems(app: FastAPI) -> None:
    """Put the shape of a problem into the OpenAPI document in place of FastAPI's own error shapes."""
    made = app.openapi

    def openapi() -> dict[str, Any]:
        if not app.openapi_schema:
            schema = made()
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
