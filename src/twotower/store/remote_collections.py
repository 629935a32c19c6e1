"""The collections of remote indexes of a store: the alias of the current one, and the removal of unreferenced ones.

COLLECTIONS.json    all collections that a publisher has begun to create and that have not been dropped

An entry is written before its collection is created, so that the collection of a killed publisher is found. A
collection belongs to the bundle whose index names it. The next publish or `gc` drops collections without a bundle,
under the store's lock. A server may hold collections of other stores and programs: only listed ones are dropped.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from pydantic import BaseModel, TypeAdapter, ValidationError

from twotower.errors import RunError, TwoTowerError
from twotower.escaping import python_literal
from twotower.files import layout
from twotower.files.urls import Url
from twotower.index import INDEXES
from twotower.index.protocol import CONNECT_TIMEOUT, CollectionServer
from twotower.kinds import UntrustedKind
from twotower.store.bundle import Bundle
from twotower.store.store import Store

log = logging.getLogger(__name__)

_MAX_FILE_BYTES = 16 << 20


class Collection(BaseModel):
    """A collection at a server, made by an index of a kind."""

    kind: str
    uri: str
    collection: str


_COLLECTIONS = TypeAdapter(list[Collection])


class _IndexLocation(BaseModel):
    """Location of a remote index. Of another index all but the kind is empty."""

    kind: str = ""
    uri: str = ""
    alias: str = ""
    collection: str = ""


class RemoteCollections:
    """The collections of the remote indexes of one store."""

    def __init__(self, store: Store, connect_timeout: float = CONNECT_TIMEOUT) -> None:
        """Read and change the collections of `store`. `connect_timeout` in seconds."""
        self._connect_timeout = connect_timeout
        self._store = store
        self._registered: list[Collection] = []

    def register(self, kind: str, uri: str, name: str) -> None:
        """List a collection before it is created. The caller holds the store's lock. Raises RunError."""
        made = Collection(kind=kind, uri=uri, collection=name)
        self._edit(lambda listed: [*listed, made])
        self._registered.append(made)
        log.info(f"index: collection {name} at {uri}")

    def drop_registered(self) -> None:
        """Drop the collections registered by this object that no bundle names. After a failure they stay listed."""
        named = self._named()
        for made in self._registered:
            if named is not None and made.collection not in named:
                self._drop(made)

    def drop_unreferenced(self) -> list[str]:
        """Drop the listed collections that no bundle names, and return their names.

        Collections on a server that does not answer stay listed. The caller holds the store's lock. Raises RunError."""
        listed = self._listed()
        if not listed or self._store.place.is_published_to():
            return []
        named = self._named()
        if named is None:
            return []
        dropped = [c for c in listed if c.collection not in named and self._drop(c)]
        if dropped:
            self._edit(lambda listed: [c for c in listed if c not in dropped])
        return [c.collection for c in dropped]

    def update_alias(self) -> str:
        """Move the alias to the collection of the current bundle. Raises RunError.

        Returns a sentence about the move, an empty string if the bundle has no collection."""
        while True:
            current = self._store.current_stamp()[0]
            found = self._location(current) if current else None
            if not found or not found.collection:
                return ""
            try:
                self._connect(found.kind, found.uri).set_alias(found.alias, found.collection)
            except TwoTowerError as e:
                raise RunError(
                    f"{current} is current, but alias {found.alias} is not on its collection yet ({e}); "
                    f"`gc(store={python_literal(str(self._store.at))})` moves it when the server answers"
                ) from e
            if self._store.current_stamp()[0] == current:  # another process may have changed it meanwhile
                return f"alias {found.alias}: {found.collection}"

    def _connect(self, kind: str, uri: str) -> CollectionServer:
        try:
            found = INDEXES.find(kind)
        except UntrustedKind as e:
            raise RunError(e.in_data) from None
        return found.connect(uri, self._connect_timeout)

    def _named(self) -> set[str] | None:
        """Return the collections that the bundles name, None if the index of a bundle cannot be read."""
        found = [self._location(listed.id) for listed in self._store.bundles()]
        return None if None in found else {location.collection for location in found if location}

    def _listed(self) -> list[Collection]:
        return self._parsed(self._store.place.read(layout.COLLECTIONS, _MAX_FILE_BYTES))

    def _parsed(self, data: bytes) -> list[Collection]:
        try:
            return _COLLECTIONS.validate_json(data) if data else []
        except ValidationError:
            what = f"{self._store.at / layout.COLLECTIONS}: not a list of collections"
            raise RunError(f"{what}; restore the file, or delete it and drop unused collections by hand") from None

    def _edit(self, change: Callable[[list[Collection]], list[Collection]]) -> None:
        def changed(data: bytes) -> bytes:
            return _COLLECTIONS.dump_json(change(self._parsed(data)), indent=1) + b"\n"

        self._store.place.edit(layout.COLLECTIONS, changed)

    def _drop(self, made: Collection) -> bool:
        try:
            self._connect(made.kind, made.uri).drop(made.collection)
        except TwoTowerError:
            return False
        return True

    def _location(self, bundle: str) -> _IndexLocation | None:
        """Return the location in a bundle's `index.json`, None if it cannot be read."""
        name = f"{layout.BUNDLES}/{bundle}/{layout.INDEX}/{layout.INDEX_FACTS}"
        try:
            return _IndexLocation.model_validate_json(self._store.place.read(name, _MAX_FILE_BYTES))
        except (RunError, ValidationError):
            return None


def rollback(
    store: Path | Url | str, to: str | None = None, *, reason: str = "", connect_timeout: float = CONNECT_TIMEOUT
) -> tuple[Bundle, str]:
    """Make an earlier bundle current (`Store.rollback`), then move the alias of a remote index to its collection.

    Returns the bundle and a sentence about the alias, empty without a collection. `connect_timeout` in seconds. Raises
    RunError."""
    opened = Store(store)
    bundle = opened.rollback(to, reason=reason)
    return bundle, RemoteCollections(opened, connect_timeout).update_alias()


def gc(store: Path | Url | str, keep: int = 2) -> tuple[list[str], list[str]]:
    """Remove old bundles (`Store.gc`), drop collections that no bundle names, and return the names of both.

    Then move the alias of a remote index, as a publish cannot while its server is down. Raises ConfigError, RunError.
    """
    opened = Store(store)
    collections, dropped = RemoteCollections(opened), []
    removed = opened.gc(keep, lambda: dropped.extend(collections.drop_unreferenced()))
    log.info(f"removed: {', '.join(removed) or 'nothing'}")
    if dropped:
        log.info(f"dropped: {', '.join(dropped)}")
    collections.update_alias()
    return removed, dropped
