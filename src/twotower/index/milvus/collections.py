"""The Milvus collections of a store: the alias of the current one, and the removal of unreferenced ones.

COLLECTIONS.json    all collections that a publisher has begun to create and that have not been dropped

An entry is written before its collection is created, so that the collection of a killed publisher is found. A collection
belongs to the bundle whose index names it; the next publish or gc drops those that no bundle names, under the store's
lock. A server may hold collections of other stores and programs: only listed collections are dropped.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from twotower import files
from twotower.errors import RunError, TwoTowerError
from twotower.escaping import python_literal
from twotower.files import layout
from twotower.files.readers import read_json
from twotower.index.milvus.location import CONNECT_TIMEOUT

if TYPE_CHECKING:
    from twotower.store.store import Store

_MAX_FILE_BYTES = 16 << 20


class MilvusCollections:
    """The Milvus collections of one store."""

    def __init__(self, store: Store, connect_timeout: float = CONNECT_TIMEOUT) -> None:
        """Read and change the collections of `store`. `connect_timeout` in seconds."""
        self._connect_timeout = connect_timeout
        self._store = store
        self._path = store.path / layout.COLLECTIONS
        self._registered: list[tuple[str, str]] = []

    def register(self, uri: str, name: str) -> None:
        """List a collection before it is created. The caller holds the store's lock. Raises RunError."""
        files.write_json(self._path, [*self._listed(), {"uri": uri, "collection": name}], 0o644)
        self._registered.append((uri, name))

    def drop_registered(self) -> None:
        """Drop the collections registered by this object that no bundle names; failures are left to `drop_unreferenced`."""
        named = self._named()
        for uri, name in self._registered:
            if named is not None and name not in named:
                self._drop(uri, name)

    def drop_unreferenced(self) -> list[str]:
        """Drop the listed collections that no bundle names, and return their names.

        Collections on a server that does not answer stay listed. The caller holds the store's lock. Raises RunError.
        """
        listed, named = self._listed(), self._named()
        if not listed or named is None:
            return []
        dropped = [e for e in listed if e["collection"] not in named and self._drop(e["uri"], e["collection"])]
        if dropped:
            files.write_json(self._path, [line for line in listed if line not in dropped], 0o644)
        return [line["collection"] for line in dropped]

    def update_alias(self) -> str:
        """Move the alias to the collection of the current bundle.

        Returns a sentence about the move, an empty string if the bundle has no collection. Raises RunError.
        """
        while True:
            current = self._store.current_stamp()[0]
            facts = _index_facts(self._store.path / layout.BUNDLES / current) if current else None
            if not facts or "collection" not in facts:
                return ""
            try:
                self._connect(facts["uri"]).set_alias(facts["alias"], facts["collection"])
            except TwoTowerError as e:
                raise RunError(
                    f"{current} is current, but alias {facts['alias']} is not on its collection yet ({e}); "
                    f"`gc(store={python_literal(self._store.path)})` moves it when Milvus answers"
                ) from e
            if self._store.current_stamp()[0] == current:  # another process may have changed it meanwhile
                return f"alias {facts['alias']}: {facts['collection']}"

    def _connect(self, uri: str) -> Any:
        from twotower.index.milvus.client import MilvusConnection

        return MilvusConnection(uri, connect_timeout=self._connect_timeout)

    def _named(self) -> set[str] | None:
        """Return the collections that bundles name, None if the index of a bundle cannot be read."""
        named = set()
        for listed in self._store.bundles():
            facts = _index_facts(self._store.path / layout.BUNDLES / listed.id)
            if facts is None:
                return None
            named.add(facts.get("collection", ""))
        return named

    def _listed(self) -> list[dict[str, str]]:
        if not self._path.exists():
            return []
        found = read_json(self._path, _MAX_FILE_BYTES)
        valid = [line for line in found if isinstance(line, dict) and {"uri", "collection"} <= line.keys()]
        if len(valid) != len(found):
            raise RunError(
                f"{self._path}: not a list of collections; restore the file, or delete it and drop unused collections by hand"
            )
        return valid

    def _drop(self, uri: str, name: str) -> bool:
        try:
            self._connect(uri).drop(name)
        except TwoTowerError:
            return False
        return True


def _index_facts(folder: Path) -> dict[str, Any] | None:
    """Return the content of a bundle's `index.json`, None if it cannot be read."""
    try:
        facts = read_json(folder / layout.INDEX / layout.INDEX_FACTS, _MAX_FILE_BYTES)
    except RunError:
        return None
    return facts if isinstance(facts, dict) else None
