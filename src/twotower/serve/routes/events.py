"""Routes of the recent events of users."""

from __future__ import annotations

from fastapi import FastAPI
from fastapi.responses import Response

from twotower.serve import replies, schemas
from twotower.serve.routes.openapi import BODY_PROBLEMS, client_problems
from twotower.serve.routes.requests import PathId, QueryId, json_response
from twotower.serve.service import Service


def add_event_routes(app: FastAPI, service: Service) -> None:
    """Add the routes of recent events."""

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
