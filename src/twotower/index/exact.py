"""Exact search: kind "exact", and the base of the indexes of all other kinds.

Rows are distinct integers from 0; a score is the inner product of query and vector, higher is better.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from twotower.arrays.sets import is_in_sorted
from twotower.arrays.types import Rows, Shaped, Vectors
from twotower.errors import DataError, RunError
from twotower.files import layout, new_folder, write_json
from twotower.index.codes import Codes
from twotower.index.protocol import INDEX_FORMAT, IndexConfig, IndexDescription, Publication
from twotower.index.top_k import SearchScope, TopK, best_of, exact_top_k, one_blas_thread
from twotower.index.vector_store import MAX_NORM, Similarity, VectorStore, checked_vectors, norms
from twotower.machine import default_threads

INDEX_FILES = (layout.INDEX_FACTS, "vectors.npy", "rows.npy", layout.INDEX_FAISS)


class Exact(IndexConfig):
    """Exact search over all vectors. Use it up to 50,000 items, which take a few milliseconds, and as the reference of
    the other kinds; `store = "int8"` takes a quarter of the memory."""

    kind = "exact"

    store: Literal["fp32", "int8"] = Field(
        "fp32",
        description="Numbers that a search reads; `int8` is a byte a number, and candidates are scored by whole "
        "vectors of the file: the same answers.",
    )

    def empty(self, width: int, metric: Similarity, publication: Publication) -> Index:
        return (CodedIndex if self.store == "int8" else Index)(self, width, metric)


class Index:
    """Item vectors (N, D) under their rows, and the search for the highest scores, here over all vectors.

    An index is filled once, and then any number of threads may search at once.
    """

    files: ClassVar[tuple[str, ...]] = ()
    """Names of files that `save` writes in addition to `INDEX_FILES`."""
    batch_invariant: bool = True
    """True if the answer to a query does not depend on the other queries of its search."""

    def __init__(self, options: IndexConfig, width: int, metric: Similarity) -> None:
        """Create an empty index of vectors of dimension `width`. Raises DataError."""
        self._store = VectorStore(width, metric)
        self.options, self.kind, self.remote = options, options.kind, options.remote
        self.metric: Similarity = metric
        self.width = width
        self.model = ""
        """SHA-256 of the model of the vectors; empty if the index does not store it."""
        self.search_params: dict[str, int] = {}
        """Parameters of a search: `nprobe`, `ef`, `refine`. Larger values raise recall and time. Empty for an exact
        index."""
        self.threads = default_threads()
        """Threads of one search; 1 in a server with several workers."""

    @property
    def rows(self) -> Shaped[Rows, "N"]:
        """Rows in the index, ascending."""
        return self._store.rows.copy()

    @property
    def rejected(self) -> Shaped[Rows, "_"]:
        """Rows of rejected vectors, ascending: not finite, too long, or of norm 0 with metric "cosine"."""
        return self._store.rejected.copy()

    def __len__(self) -> int:
        return len(self._store)

    def vectors(self, rows: Shaped[Rows, "n"]) -> Shaped[Vectors, "m D"]:
        """Return the vectors of rows, without rejected ones. Raises DataError for unknown rows."""
        found: Vectors = self._store.vectors[self._store.known(rows)]
        return found

    def scores(self, query: Shaped[Vectors, "1 D"]) -> Shaped[Vectors, "N"]:
        """Return the scores of a query for all `rows`, summed in float32. Raises DataError."""
        query = self._checked_queries(query, 1)[0]
        with one_blas_thread:
            found: Vectors = self._store.vectors @ query
        return found

    def search_limits(self) -> dict[str, int]:
        """Return the largest useful value of each of `search_params`, in the order in which to tune them."""
        return {}

    def fill(self, rows: Shaped[Rows, "*_"], vectors: Shaped[Vectors, "*_"]) -> None:
        """Set the rows (n,) and vectors (n, D) of an empty index, once. Raises DataError."""
        self._store.fill(rows, vectors)
        self._build_engine()

    def _build_engine(self) -> None:
        """Build the engine of the vectors in the store."""

    # Search

    def search(
        self, queries: Shaped[Vectors, "B D"], k: int, *, allowed: Shaped[Rows, "_"] | None = None,
        banned: Sequence[Shaped[Rows, "_"]] | None = None, exact: bool = False,
    ) -> tuple[Shaped[Rows, "B k"], Shaped[Vectors, "B k"]]:  # fmt: skip
        """Return the `k` rows with the highest scores for each query, in descending order, and the scores.

        Equal scores are ordered by row. `allowed` applies to all queries, `banned[i]` to query i; rows outside the
        index are ignored. If fewer than `k` rows remain, the answer is padded with row -1 and score -inf. `exact`
        scores every vector. Raises DataError.
        """
        queries, k = self._checked_queries(queries, k), int(k)  # a numpy integer could overflow
        return self._search(queries, k, self._scope(len(queries), allowed, banned), exact)

    def _search(self, queries: Shaped[Vectors, "B D"], k: int, scope: SearchScope, exact: bool) -> TopK:
        return self._search_exactly(queries, k, scope)

    def _search_exactly(self, queries: Shaped[Vectors, "B D"], k: int, scope: SearchScope) -> TopK:
        return exact_top_k(self._store, queries, k, scope, self.threads)

    def _checked_queries(self, queries: Shaped[Vectors, "B _"], k: int) -> Shaped[Vectors, "B D"]:
        if isinstance(k, bool) or not isinstance(k, (int, np.integer)) or k < 1:
            raise DataError(f"k is {k!r}, expected a whole number from 1")
        queries = checked_vectors(queries, self.width, "queries")
        usable = norms(queries) <= MAX_NORM
        if not usable.all():
            raise DataError(f"query {int(np.argmin(usable))} is not finite, or its norm is above {MAX_NORM:g}")
        return queries

    def _scope(
        self, n_queries: int, allowed: Shaped[Rows, "_"] | None, banned: Sequence[Shaped[Rows, "_"]] | None
    ) -> SearchScope:
        only = None if allowed is None else self._store.positions(allowed)
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
        """Return the content of `index.json`."""
        return IndexDescription(
            format=INDEX_FORMAT,
            kind=self.kind,
            metric=self.metric,
            n=len(self),
            width=self.width,
            params=self.options.params,
            search_params=self.search_params,
            max_norm=self._store.max_norm,
            rejected=self._store.rejected.tolist(),
        )

    def save(self, folder: Path) -> None:
        """Write the index into a folder. Raises RunError."""
        names = {f.name for f in folder.iterdir()} if folder.is_dir() else set()
        foreign = sorted(names - {*INDEX_FILES, *self.files})
        if foreign:
            raise RunError(f"{folder}: holds {foreign[0]}, which is no file of an index; choose an empty folder")
        with new_folder(folder) as temporary:
            self._save_engine(temporary)
            write_json(temporary / layout.INDEX_FACTS, self.describe().model_dump())

    def _save_engine(self, folder: Path) -> None:
        np.save(folder / "vectors.npy", self._store.vectors)
        np.save(folder / "rows.npy", self._store.rows)

    def restore(self, folder: Path, known: IndexDescription) -> None:
        """Read the rows and vectors of a folder with the description `known`. Raises ValueError, DataError,
        RunError."""
        self._store.load(folder)
        self._set_description(known)

    def load_engine(self, folder: Path, verify: bool) -> None:
        """Read the other files after `restore`, first in a child process if `verify`. Raises RunError."""

    def _set_description(self, facts: IndexDescription) -> None:
        """Set the facts of a folder whose rows are loaded. Raises ValueError if they do not fit."""
        self.search_params = {name: max(1, facts.search_params[name]) for name in self.search_params}
        self._store.max_norm, self._store.rejected = facts.max_norm, np.asarray(facts.rejected, np.int64)
        if len(self) != facts.n:
            raise ValueError("rows are missing")


class CodedIndex(Index):
    """An index that searches codes of one byte a number, and scores what they leave by the vectors."""

    _codes: Codes | None = None

    def _build_engine(self) -> None:
        if len(self):
            self._codes = Codes(self._store.vectors)

    def load_engine(self, folder: Path, verify: bool) -> None:
        self._build_engine()

    def _search(self, queries: Shaped[Vectors, "B D"], k: int, scope: SearchScope, exact: bool) -> TopK:
        if exact or scope.only is not None or self._codes is None:
            return self._search_exactly(queries, k, scope)
        top = TopK.empty(len(queries), k)
        banned = scope.banned or [np.empty(0, np.int64)] * len(queries)
        for number, at in enumerate(self._codes.candidates(queries, k, banned, self.threads)):
            top.put(number, *best_of(self._store, queries[number], at, k))
        return top
