"""Routes of the admin port: bundles, rollback and reload."""

from __future__ import annotations

import logging
from json import dumps

import orjson
from fastapi import FastAPI
from fastapi.responses import Response

from twotower.errors import BundleError, RunError
from twotower.serve import schemas
from twotower.serve.console import Console
from twotower.serve.problems import Problem
from twotower.serve.routes.openapi import json_response
from twotower.serve.service import Service
from twotower.store.remote_collections import RemoteCollections
from twotower.store.store import Store

log = logging.getLogger("twotower.app")


def add_admin_routes(app: FastAPI, service: Service) -> None:
    """Add the routes of the admin port."""

    @app.get("/v1/bundles")
    async def bundles() -> Response:
        """List the bundles of the store and its latest 100 changes."""
        history = await service.bundles.with_store(lambda store: store.history()[-100:])
        # A reason from a shell may contain lone surrogates, which are not UTF-8.
        text = dumps(history, ensure_ascii=False).encode(errors="replace")
        listed = await Console(service).bundles()
        return json_response({**listed, "history": orjson.loads(text)})

    @app.post("/v1/rollback")
    async def rollback(body: schemas.RollbackRequest) -> Response:
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
            await service.bundles.with_store(lambda store: RemoteCollections(store).update_alias())
        except RunError as e:
            log.warning("the alias of the index was not updated", extra={"fields": {"detail": str(e)}})
        await service.bundles.refresh()
        return json_response({"current": bundle.id, "serving": service.bundles.current_id})

    @app.post("/v1/reload")
    async def reload() -> Response:
        """Load the current bundle again, also if it was refused; in every worker, if the store can be written."""
        try:
            await service.bundles.with_store(Store.touch_current)
        except RunError as e:
            if _is_silent(e):
                raise
        await service.bundles.refresh(retry=True)
        return json_response({"serving": service.bundles.current_id, "refused": service.bundles.last_error})


def _is_silent(error: RunError) -> bool:
    """Return True for the error of a store that does not answer."""
    return isinstance(error, BundleError) and error.reason == "store"
