"""Return to an earlier bundle and remove old ones, together with the collections of their remote indexes."""

from __future__ import annotations

import logging
from pathlib import Path

from twotower.files.urls import Url
from twotower.index.protocol import CONNECT_TIMEOUT
from twotower.store.bundle import Bundle
from twotower.store.remote_collections import RemoteCollections
from twotower.store.store import Store

log = logging.getLogger(__name__)


def rollback(
    store: Path | Url | str, to: str | None = None, *, reason: str = "", connect_timeout: float = CONNECT_TIMEOUT
) -> tuple[Bundle, str]:
    """Make an earlier bundle current (`Store.rollback`), then move the alias of a remote index to its collection.

    Returns the bundle and a sentence about the alias, empty without a collection. `connect_timeout` in seconds. Raises
    RunError.
    """
    opened = Store(store)
    bundle = opened.rollback(to, reason=reason)
    return bundle, RemoteCollections(opened, connect_timeout).update_alias()


def gc(store: Path | Url | str, keep: int = 2) -> tuple[list[str], list[str]]:
    """Remove old bundles (`Store.gc`) and drop collections that no bundle names; log and return both as names.

    Moves the alias of a remote index at the end: a publish cannot while its server is down. Raises ConfigError, RunError.
    """
    opened = Store(store)
    collections, dropped = RemoteCollections(opened), []
    removed = opened.gc(keep, lambda: dropped.extend(collections.drop_unreferenced()))
    log.info(f"removed: {', '.join(removed) or 'nothing'}")
    if dropped:
        log.info(f"dropped: {', '.join(dropped)}")
    collections.update_alias()
    return removed, dropped
