"""Exact search, and the base of all other indexes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Self

import numpy as np
from pydantic import JsonValue

from twotower.arrays.sets import is_in_sorted
from twotower.arrays.types import Rows, Vectors
from twotower.errors import ConfigError, DataError, RunError, TwoTowerError, did_you_mean
from twotower.files import layout, new_folder, write_json
from twotower.index.blas_threads import one_blas_thread
from twotower.index.description import INDEX_FORMAT, IndexDescription, parse_description
from twotower.index.milvus.location import MilvusLocation
from twotower.index.top_k import SearchScope, TopK, exact_top_k
from twotower.index.vector_store import MAX_NORM, Metric, VectorStore, checked_rows, checked_vectors, norms
from twotower.machine import default_threads

INDEX_FILES = (layout.INDEX_FACTS, "vectors.npy", "rows.npy", layout.INDEX_FAISS)


class ExactIndex:
    """A vector store and exact search over it; implements `protocol.Index`."""

    kind: ClassVar[str] = "exact"
    remote: ClassVar[bool] = False
    defaults: ClassVar[dict[str, int]] = {}
    """Build parameters and their defaults."""
    description_type: ClassVar[type[IndexDescription]] = IndexDescription
    params: dict[str, int]
    search_params: dict[str, int]

    def __init__(self, width: int, metric: Metric, params: dict[str, int] | None = None) -> None:
        """Create an empty index of vectors of dimension `width`. Raises ConfigError, DataError."""
        self._store = VectorStore(width, metric)
        self.metric: Metric = metric
        self.params = complete_params(self.kind, self.defaults, params)
        self.search_params = {}
        self.threads = default_threads()

    @classmethod
    def build(
        cls,
        vectors: Vectors,
        rows: Rows,
        metric: Metric,
        params: dict[str, int] | None = None,
        location: MilvusLocation | None = None,
    ) -> Self:
        """Build an index of vectors (N, D) under rows (N,); rows of unusable vectors are in `rejected`. Raises DataError."""
        if np.ndim(vectors) != 2:
            raise DataError(f"vectors have shape {np.shape(vectors)}, expected (N, D)")
        index = cls._empty(np.shape(vectors)[1], metric, params, location)
        index.add(rows, vectors)
        return index

    @classmethod
    def _empty(cls, width: int, metric: Metric, params: dict[str, int] | None, location: MilvusLocation | None) -> Self:
        return cls(width, metric, params)

    @property
    def rows(self) -> Rows:
        return self._store.sorted_rows.copy()

    @property
    def rejected(self) -> Rows:
        return self._store.rejected.copy()

    @property
    def width(self) -> int:
        return self._store.width

    @property
    def model(self) -> str:
        return ""

    def __len__(self) -> int:
        return len(self._store)

    def vectors(self, rows: Rows) -> Vectors:
        """Return the vectors (n, D) of rows (n,). Raises DataError for unknown rows."""
        found: Vectors = self._store.vectors[self._store.known(rows)]
        return found

    def scores(self, query: Vectors) -> Vectors:
        query = self._checked_queries(query, 1)[0]
        with one_blas_thread:
            found: Vectors = self._store.vectors @ query
        return found if self._store.identity else found[self._store.sorted_positions]

    def search_limits(self) -> dict[str, int]:
        return {}

    # Changes

    def add(self, rows: Rows, vectors: Vectors) -> None:
        rows, vectors = self._store.checked(rows, vectors)
        present = rows[self._store.find(rows) >= 0]
        if len(present):
            raise DataError(f"row {present[0]} is in the index already; use update")
        self._changed(self._store.append(rows, vectors))

    def update(self, rows: Rows, vectors: Vectors) -> None:
        rows, vectors = self._store.checked(rows, vectors)
        self._changed(self._store.delete(self._store.known(rows)))
        self._changed(self._store.append(rows, vectors))

    def remove(self, rows: Rows) -> None:
        rows = checked_rows(rows)
        self._changed(self._store.delete(self._store.known(rows)))
        self._store.rejected = np.setdiff1d(self._store.rejected, rows)

    def _changed(self, kept: int | None) -> None:
        """Update the engine after a change: positions below `kept` have their vectors still, or none. None: no change."""

    # Search

    def search(
        self,
        queries: Vectors,
        k: int,
        *,
        allowed: Rows | None = None,
        banned: Sequence[Rows] | None = None,
        exact: bool = False,
    ) -> tuple[Rows, Vectors]:
        queries, k = self._checked_queries(queries, k), int(k)  # a numpy integer could overflow
        return self._search(queries, k, self._scope(len(queries), allowed, banned), exact)

    def _search(self, queries: Vectors, k: int, scope: SearchScope, exact: bool) -> TopK:
        return self._search_exactly(queries, k, scope)

    def _search_exactly(self, queries: Vectors, k: int, scope: SearchScope) -> TopK:
        return exact_top_k(self._store, queries, k, scope, self.threads)

    def _checked_queries(self, queries: Vectors, k: int) -> Vectors:
        if isinstance(k, bool) or not isinstance(k, (int, np.integer)) or k < 1:
            raise DataError(f"k is {k!r}, expected a whole number from 1")
        queries = checked_vectors(queries, self.width, "queries")
        usable = norms(queries) <= MAX_NORM
        if not usable.all():
            raise DataError(f"query {int(np.argmin(usable))} is not finite, or its norm is above {MAX_NORM:g}")
        return queries

    def _scope(self, n_queries: int, allowed: Rows | None, banned: Sequence[Rows] | None) -> SearchScope:
        only = None
        if allowed is not None:
            only = self._store.positions(allowed)
        remaining = np.full(n_queries, len(self) if only is None else len(only))
        if banned is None:
            return SearchScope(only, None, remaining)
        if len(banned) != n_queries:
            raise DataError(
                f"banned has {len(banned)} arrays of rows for {n_queries} queries, expected one array of rows for each"
            )
        positions = []
        for number, rows in enumerate(banned):
            found = self._store.positions(rows)
            if only is not None:
                found = found[is_in_sorted(only, found)]
            remaining[number] -= len(found)
            positions.append(found)
        return SearchScope(only, positions, remaining)

    # Files

    def describe(self) -> IndexDescription:
        return IndexDescription(
            format=INDEX_FORMAT,
            kind=self.kind,
            metric=self.metric,
            n=len(self),
            width=self.width,
            params=self.params,
            search_params=self.search_params,
            max_norm=self._store.max_norm,
            rejected=self._store.rejected.tolist(),
        )

    def save(self, folder: Path) -> None:
        foreign = sorted(f.name for f in folder.iterdir() if f.name not in INDEX_FILES) if folder.is_dir() else []
        if foreign:
            raise RunError(f"{folder}: holds {foreign[0]}, which is no file of an index; choose an empty folder")
        with new_folder(folder) as temporary:
            self._save_engine(temporary)
            write_json(temporary / layout.INDEX_FACTS, self.describe().model_dump())

    def _save_engine(self, folder: Path) -> None:
        self._store.save(folder)

    @classmethod
    def restore(cls, folder: Path, facts: dict[str, JsonValue], mmap: bool, verify: bool) -> Self:
        """Load the index of a folder; `facts` is the content of its `index.json`. Raises RunError."""
        try:
            known = parse_description(cls.description_type, facts)
            index = cls(known.width, known.metric, known.params)
            index._store.load(folder, mmap)
            index._set_description(known)
        except (ValueError, KeyError, OverflowError, TwoTowerError) as e:
            raise RunError(f"{folder}: not a usable index ({e})") from e
        return index

    def _set_description(self, facts: IndexDescription) -> None:
        """Take over the facts of a folder whose rows are loaded. Raises ValueError if they do not fit."""
        self.search_params = {name: max(1, facts.search_params[name]) for name in self.search_params}
        self._store.max_norm, self._store.rejected = facts.max_norm, np.asarray(facts.rejected, np.int64)
        if len(self) != facts.n:
            raise ValueError("rows are repeated or missing")


def complete_params(kind: str, defaults: dict[str, int], params: dict[str, int] | None) -> dict[str, int]:
    """Return `params` completed with `defaults`. Raises ConfigError for an unknown parameter or value."""
    for name, value in (params or {}).items():
        if name not in defaults:
            known = ", ".join(defaults) or "none"
            raise ConfigError(f"{name}: no parameter of {kind} (allowed: {known}){did_you_mean(name, defaults)}")
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 24:
            raise ConfigError(f"{name} is {value!r}, expected a whole number from 0 to {(1 << 24) - 1:,}")
    return defaults | (params or {})
