"""Routes for clients: recommendations, vectors, searches, the current bundle, and recent events."""

from __future__ import annotations

from functools import partial

from fastapi import FastAPI

from twotower.serve import replies
from twotower.serve.routes.openapi import BODY_PROBLEMS, BY_QUERY, add_route
from twotower.serve.service import Service

ITEM_PROBLEMS = ("unknown-item", "invalid", "no-bundle", "index-unavailable")


def add_client_routes(app: FastAPI, service: Service) -> None:
    """Add the routes of answers and of recent events."""
    add = partial(add_route, app, "answers")
    add("POST", "/v1/recommend", service.recommend, replies.ItemsReply,
        *BODY_PROBLEMS, "unknown-user", "index-unavailable")  # fmt: skip
    add("POST", "/v1/recommend:batch", service.recommend_batch, replies.BatchReply, *BODY_PROBLEMS)
    add("POST", "/v1/embed/user", service.embed_user, replies.VectorReply, *BODY_PROBLEMS, "unknown-user")
    add("GET", "/v1/items/{item_id:path}/similar", service.similar, replies.ItemsReply, *ITEM_PROBLEMS, "not-found")
    add("GET", "/v1/items/similar", service.similar, replies.ItemsReply, *ITEM_PROBLEMS,
        name="similar_by_query", description=f"Return similar items{BY_QUERY}")  # fmt: skip
    add("POST", "/v1/search", service.search, replies.ItemsReply,
        *BODY_PROBLEMS, "no-text-feature", "index-unavailable")  # fmt: skip
    add("GET", "/v1/bundle", service.bundle, replies.BundleReply, "no-bundle")
    add = partial(add_route, app, "events")
    add("POST", "/v1/events", service.add_events, replies.EventsReply, *BODY_PROBLEMS, "conflict", status=202)
    add(
        "DELETE", "/v1/events/{user_id:path}", service.forget, None, "not-found", "no-bundle", "event-store", status=204
    )
    add("DELETE", "/v1/events", service.forget, None, "invalid", "no-bundle", "event-store", status=204,
        name="forget_by_query", description=f"Delete a user's recent events{BY_QUERY}")  # fmt: skip
