"""The Milvus collections of a store: which one the alias stands for, and which ones are nobody's any more.

COLLECTIONS.json    every collection that a publisher began to make and that is not known to be gone

A line is written before the collection is made, so that what a killed publisher left is found again. A collection belongs
to the bundle whose index names it; one that no bundle names is dropped by the next publish or gc, under the store's lock.
A server may hold collections of other stores and programs: only what is listed here is touched.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from twotower import files
from twotower.errors import RunError, TwoTowerError
from twotower.escaping import python_literal
from twotower.index.protocol import CONNECT_TIMEOUT

if TYPE_CHECKING:
    from twotower.store import Store

COLLECTIONS_FILE = "COLLECTIONS.json"
_MAX_FILE_BYTES = 16 << 20


class MilvusCollections:
    """Those of one store."""

    def __init__(self, store: Store, connect_timeout: float = CONNECT_TIMEOUT) -> None:
        """`connect_timeout`: seconds that a connection may take."""
        self._connect_timeout = connect_timeout
        self._store = store
        self._path = store.path / COLLECTIONS_FILE
        self._registered: list[tuple[str, str]] = []

    def register(self, uri: str, name: str) -> None:
        """Write down that a collection is about to be made. To be called under the store's lock. Raises RunError."""
        files.write_json(self._path, [*self._listed(), {"uri": uri, "collection": name}], 0o644)
        self._registered.append((uri, name))

    def drop_registered(self) -> None:
        """Drop what was announced here and no bundle names; what cannot be dropped now is left to `drop_unreferenced`."""
        named = self._named()
        for uri, name in self._registered:
            if named is not None and name not in named:
                self._drop(uri, name)

    def drop_unreferenced(self) -> list[str]:
        """Drop every listed collection that no bundle names, and the names of those that went; what cannot be reached
        stays listed. To be called under the store's lock. Raises RunError."""
        listed, named = self._listed(), self._named()
        if not listed or named is None:
            return []
        gone = [e for e in listed if e["collection"] not in named and self._drop(e["uri"], e["collection"])]
        if gone:
            files.write_json(self._path, [line for line in listed if line not in gone], 0o644)
        return [line["collection"] for line in gone]

    def update_alias(self) -> str:
        """Make the alias stand for the current bundle's collection; what was done, or an empty string where the bundle
        has none. Raises RunError."""
        while True:
            current = self._store.current_stamp()[0]
            said = _index_facts(self._store.path / "bundles" / current) if current else None
            if not said or "collection" not in said:
                return ""
            try:
                self._connect(said["uri"]).set_alias(said["alias"], said["collection"])
            except TwoTowerError as e:
                raise RunError(
                    f"{current} is current, but the alias {said['alias']} does not stand for its collection yet ({e}); "
                    f"`gc(store={python_literal(self._store.path)})` moves it when Milvus answers"
                ) from e
            if self._store.current_stamp()[0] == current:  # somebody else may have been quicker
                return f"alias {said['alias']}: {said['collection']}"

    def _connect(self, uri: str) -> Any:
        from twotower.index.milvus.client import MilvusConnection

        return MilvusConnection(uri, connect_timeout=self._connect_timeout)

    def _named(self) -> set[str] | None:
        """The collections that bundles name, None if that cannot be said of one of them."""
        named = set()
        for listed in self._store.bundles():
            said = _index_facts(self._store.path / "bundles" / listed.id)
            if said is None:
                return None
            named.add(said.get("collection", ""))
        return named

    def _listed(self) -> list[dict[str, str]]:
        if not self._path.exists():
            return []
        found = files.read_json(self._path, _MAX_FILE_BYTES)
        ours = [line for line in found if isinstance(line, dict) and {"uri", "collection"} <= line.keys()]
        if len(ours) != len(found):
            raise RunError(f"{self._path}: not a list of collections; restore it, or remove it and drop them by hand")
        return ours

    def _drop(self, uri: str, name: str) -> bool:
        try:
            self._connect(uri).drop(name)
        except TwoTowerError:
            return False
        return True


def _index_facts(folder: Path) -> dict[str, Any] | None:
    """What the index of a bundle says, None if it cannot be read."""
    try:
        said = files.read_json(folder / "index" / "index.json", _MAX_FILE_BYTES)
    except RunError:
        return None
    return said if isinstance(said, dict) else None
