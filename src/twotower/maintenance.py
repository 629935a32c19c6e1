"""Return to an earlier bundle and remove old ones, together with their Milvus collections."""

from __future__ import annotations

from pathlib import Path

from twotower.bundle import Bundle
from twotower.index.milvus.collections import MilvusCollections
from twotower.index.protocol import CONNECT_TIMEOUT
from twotower.store import Store


def rollback(
    store: Path | str, to: str | None = None, *, reason: str = "", connect_timeout: float = CONNECT_TIMEOUT
) -> tuple[Bundle, str]:
    """`Store.rollback`, and the alias follows: the bundle, and what was done to the alias. Raises RunError."""
    opened = Store(store)
    bundle = opened.rollback(to, reason=reason)
    return bundle, MilvusCollections(opened, connect_timeout).update_alias()


def gc(store: Path | str, keep: int = 2) -> tuple[list[str], list[str]]:
    """`Store.gc`, and the collections of no bundle are dropped: the bundles and the collections that went."""
    opened = Store(store)
    found, dropped = MilvusCollections(opened), []
    gone = opened.gc(keep, lambda: dropped.extend(found.drop_unreferenced()))
    return gone, dropped
