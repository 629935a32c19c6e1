"""Routes for clients: recommendations, vectors, searches, the current bundle, and recent events."""

from __future__ import annotations

from fastapi import FastAPI, Request
from fastapi.responses import Response

from twotower.serve import replies, schemas
from twotower.serve.routes.openapi import BODY_PROBLEMS, ItemCount, PathId, QueryId, client_problems, json_response
from twotower.serve.service import Service


def add_client_routes(app: FastAPI, service: Service) -> None:
    """Add the routes of answers and of recent events."""

    @app.post(
        "/v1/recommend",
        response_model=replies.ItemsReply,
        responses=client_problems(*BODY_PROBLEMS, "unknown-user", "index-unavailable"),
        tags=["answers"],
    )
    async def recommend(body: schemas.RecommendRequest) -> Response:
        """Recommend items to a user, known or described by the request."""
        return json_response(await service.recommend(body))

    @app.post(
        "/v1/recommend:batch",
        response_model=replies.BatchReply,
        responses=client_problems(*BODY_PROBLEMS),
        tags=["answers"],
    )
    async def recommend_batch(body: schemas.BatchRequest, request: Request) -> Response:
        """Answer several requests.

        One that cannot be answered gets a problem in its place; a field of another type or range fails them all."""
        return json_response(await service.batch(body, request.is_disconnected))

    @app.post(
        "/v1/embed/user",
        response_model=replies.VectorReply,
        responses=client_problems(*BODY_PROBLEMS, "unknown-user"),
        tags=["answers"],
    )
    async def embed_user(body: schemas.UserRequest) -> Response:
        """Return the vector of a user."""
        return json_response(await service.embed(body))

    @app.get(
        "/v1/items/{item_id:path}/similar", response_model=replies.ItemsReply,
        responses=client_problems("unknown-item", "not-found", "invalid", "no-bundle", "index-unavailable"),
        tags=["answers"],
    )  # fmt: skip
    async def similar(item_id: PathId, k: ItemCount = 10) -> Response:
        """Return the items with the most similar vectors. Scores are cosines."""
        return json_response(await service.similar(item_id, k))

    @app.get(
        "/v1/items/similar", response_model=replies.ItemsReply,
        responses=client_problems("unknown-item", "invalid", "no-bundle", "index-unavailable"), tags=["answers"],
    )  # fmt: skip
    async def similar_by_query(item_id: QueryId, k: ItemCount = 10) -> Response:
        """Return similar items, with the id in the query: clients remove `.` and `..` from a path."""
        return await similar(item_id, k)

    @app.post(
        "/v1/search",
        response_model=replies.ItemsReply,
        responses=client_problems(*BODY_PROBLEMS, "no-text-feature", "index-unavailable"),
        tags=["answers"],
    )
    async def search(body: schemas.SearchRequest) -> Response:
        """Recommend items for a text."""
        return json_response(await service.search(body))

    @app.get("/v1/bundle", response_model=replies.BundleReply, responses=client_problems("no-bundle"), tags=["answers"])
    async def bundle() -> Response:
        """Describe the current bundle and the limits of requests."""
        return json_response(service.describe())

    @app.post(
        "/v1/events",
        response_model=replies.EventsReply,
        status_code=202,
        responses=client_problems(*BODY_PROBLEMS, "conflict"),
        tags=["events"],
    )
    async def add_events(body: schemas.EventsRequest) -> Response:
        """Append to a user's recent events, which the next answer uses."""
        return json_response(await service.add_events(body), 202)

    @app.delete(
        "/v1/events/{user_id:path}",
        status_code=204,
        responses=client_problems("not-found", "no-bundle", "event-store"),
        tags=["events"],
    )
    async def forget(user_id: PathId) -> Response:
        """Delete a user's recent events."""
        await service.forget(user_id)
        return Response(status_code=204)

    @app.delete(
        "/v1/events", status_code=204, responses=client_problems("invalid", "no-bundle", "event-store"), tags=["events"]
    )
    async def forget_by_query(user_id: QueryId) -> Response:
        """Delete a user's recent events, with the id in the query: clients remove `.` and `..` from a path."""
        return await forget(user_id)
