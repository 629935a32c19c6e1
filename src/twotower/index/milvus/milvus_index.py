"""Approximate search in Milvus. Milvus returns ANN candidates with their vectors, which are re-scored exactly.

The vectors are in this process while an index is built and tuned, and in a collection after `save`. A collection has a
unique name and never changes. If Milvus returns too few candidates, because
few rows are allowed or nearly all of the nearest are banned, all vectors are fetched and scored page by page, so no
answer is short. Augmented vectors are searched by L2 distance.
"""

from __future__ import annotations

import secrets
import sys
import threading
import weakref
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from twotower import files
from twotower.arrays.pieces import pieces
from twotower.arrays.sets import is_in_sorted
from twotower.arrays.types import Rows, Shaped, Vectors
from twotower.errors import RunError
from twotower.index.approximate import ApproximateIndex, Effort
from twotower.index.exact import Exact
from twotower.index.milvus.client import MESSAGE_MAX_BYTES, CollectionError, MilvusConnection, page_rows
from twotower.index.milvus.milvus import Milvus, MilvusDescription
from twotower.index.protocol import CONNECT_TIMEOUT, IndexDescription, Publication
from twotower.index.top_k import SearchScope, TopK, best, exact_scores
from twotower.index.vector_store import Similarity

INSERT_ROWS = 4096
NAMED_MAX_ROWS = 16_384
"""Largest number of rows in a filter expression. Hits outside more allowed rows are dropped after the search."""
MAX_HITS = 16_384
"""Largest number of hits of a search, a limit of Milvus."""
EXACT_MAX_ROWS = 1024
"""Default of `exact_max_rows`: one call fetches these vectors."""
SEARCH_PARAMS: dict[str, dict[str, int]] = {
    "FLAT": {}, "IVF_FLAT": {"nprobe": 16}, "IVF_SQ8": {"nprobe": 16, "refine": 2}, "HNSW": {"ef": 64},
}  # fmt: skip
"""Default search parameters of each index type of Milvus."""


class MilvusIndex(ApproximateIndex):
    """Index whose vectors are in a Milvus collection."""

    options: Milvus
    efforts = (*ApproximateIndex.efforts, Effort(16, 16, True), Effort(16, sys.maxsize, True))

    def __init__(self, options: Milvus, width: int, metric: Similarity, publication: Publication) -> None:
        """Create an empty index. Raises DataError."""
        super().__init__(options, width, metric)
        self.search_params = dict(SEARCH_PARAMS[options.type])
        self.exact_max_rows = EXACT_MAX_ROWS
        self.collection = ""
        """Name of the collection; an empty string until it is created."""
        self.named_max_rows = NAMED_MAX_ROWS
        self.max_hits = MAX_HITS
        self.connect_timeout = CONNECT_TIMEOUT
        self.model, self._register = publication.model, publication.register
        self._nlist = 1
        self._is_remote = False
        self._creation_lock = threading.Lock()
        self._cached_connection: MilvusConnection | None = None

    @property
    def _connection(self) -> MilvusConnection:
        if self._cached_connection is None:
            options = self.options
            self._cached_connection = client = MilvusConnection(options.uri, options.timeout, self.connect_timeout)
            weakref.finalize(self, client.close)
        return self._cached_connection

    @property
    def _description(self) -> str:
        """Description stored with a collection and compared when a folder is loaded."""
        return f"model {self.model or '-'}, {len(self)} vectors, {self.metric}"

    @property
    def _milvus_metric(self) -> str:
        return "L2" if self._augmented else "COSINE"

    def search_limits(self) -> dict[str, int]:
        limits = {"nprobe": self._nlist, "refine": 16, "ef": max(64, min(len(self), 4096))}
        return {name: limits[name] for name in self.search_params}

    def vectors(self, rows: Shaped[Rows, "n"]) -> Shaped[Vectors, "m D"]:
        return self._fetch(self._store.known(rows))

    def scores(self, query: Shaped[Vectors, "1 D"]) -> Shaped[Vectors, "N"]:
        query = self._checked_queries(query, 1)[0]
        parts = [self._fetch(at) @ query for at in self._pages(np.arange(len(self)))]
        found: Vectors = np.concatenate(parts) if parts else np.empty(0, np.float32)
        return found

    def _build_engine(self) -> None:
        if "nlist" in self.options.params:
            wanted = self.options.nlist or round(4 * len(self) ** 0.5)
            self._nlist = max(1, min(wanted, len(self) // 8, 65_536))

    def _create_collection(self) -> None:
        """Create a collection and insert the vectors. Raises RunError, Unavailable."""
        with self._creation_lock:
            if self.collection:
                return
            options, params = self.options, self.options.params
            name = f"{options.prefix}_{datetime.now(UTC):%Y%m%dT%H%M%S}_{secrets.token_hex(4)}"
            if self._register is not None:
                self._register(self.kind, options.uri, name)
            self._connection.create_collection(name, self._engine_width, self._description)
            for at in pieces(len(self), min(INSERT_ROWS, page_rows(self.width + 1))):
                self._connection.insert(name, self._store.rows[at], self._engine_vectors(self._store.vectors[at]))
                files.point("milvus.inserted")
            wanted = {"nlist": self._nlist} if "nlist" in params else {}
            if "m" in params:
                wanted = {"M": options.m, "efConstruction": options.ef_construction}
            self._connection.build_index(name, options.type, self._milvus_metric, wanted)
            if (n := self._connection.count(name)) != len(self):
                raise RunError(f"{options.uri}: {name} holds {n:,} rows, {len(self):,} were inserted")
            self.collection = name

    # Search

    @property
    def _max_hits(self) -> int:
        """Largest number of hits of a search."""
        return min(self.max_hits, MESSAGE_MAX_BYTES // (4 * self.width))

    def _prefers_exact(self, k: int, scope: SearchScope) -> bool:
        exhaustive = self.search_params.get("ef", 0) >= len(self) > 0
        return super()._prefers_exact(k, scope) or exhaustive or k + max(8, k // 8) > self._max_hits

    def _search_candidates(
        self, queries: Shaped[Vectors, "B D"], k: int, scope: SearchScope, effort: Effort, todo: Shaped[Rows, "b"],
        top: TopK,
    ) -> Shaped[Rows, "_"]:  # fmt: skip
        """Fill `top` for the queries `todo` with re-scored candidates; return the queries with too few.

        The filter names up to `named_max_rows` allowed rows, and as many banned rows of one query.
        """
        if not self.collection:
            self._create_collection()
        fetch = min(len(self), self._max_hits, self._candidates(k) * effort.more)
        params: dict[str, int] = {}
        if "nprobe" in self.search_params:
            params = {"nprobe": min(self._nlist, self.search_params["nprobe"] * effort.factor)}
        if "ef" in self.search_params:
            params = {"ef": max(fetch, min(self.search_params["ef"] * effort.factor, 32_768))}
        only, store = scope.only, self._store
        named = None if only is None or len(only) > self.named_max_rows else store.rows[only]
        wide = self._engine_queries(queries)
        most = min(1024, MESSAGE_MAX_BYTES // (4 * fetch * (self.width + 1)), self.max_hits // fetch)
        step = 1 if effort.name_banned else max(1, most)
        short = []
        for start in range(0, len(todo), step):
            some = todo[start : start + step]
            banned = None
            if effort.name_banned and scope.banned and len(scope.banned[some[0]]) <= self.named_max_rows:
                banned = store.rows[scope.banned[some[0]]]
            hits = self._connection.search(
                self.collection, wide[some], fetch, params, self._milvus_metric, named, banned, self._is_remote
            )  # fmt: skip
            for number, hit in zip(some.tolist(), hits, strict=True):
                at = store.find(np.array([h["row"] for h in hit], np.int64))
                good = at >= 0
                if only is not None and named is None:
                    good &= is_in_sorted(only, at)
                if scope.banned is not None:
                    good &= ~is_in_sorted(scope.banned[number], at)
                if self._is_remote:
                    vectors = np.array([hit[i]["entity"]["vector"] for i in np.flatnonzero(good)], np.float32)
                    vectors = vectors.reshape(-1, self._engine_width)[:, : self.width]
                else:
                    vectors = store.vectors[at[good]]
                found = best(store.rows[at[good]], exact_scores(vectors, queries[number]), k)
                top.put(number, *found)
                if found.rows.size < min(k, scope.remaining[number]):
                    short.append(number)
        return np.asarray(short, np.int64)

    def _search_exactly(self, queries: Shaped[Vectors, "B D"], k: int, scope: SearchScope) -> TopK:
        """Search exactly, with vectors fetched page by page if they are only in the collection."""
        if not self._is_remote:
            return super()._search_exactly(queries, k, scope)
        banned = None if scope.banned is None else [self._store.rows[b] for b in scope.banned]
        top = TopK.empty(len(queries), 0)
        for at in self._pages(np.arange(len(self)) if scope.only is None else scope.only):
            page = Exact().build(self._fetch(at), self._store.rows[at], self.metric)
            page.threads = self.threads
            found, scores = page.search(queries, k, banned=banned)
            top = best(np.column_stack([top.rows, found]), np.column_stack([top.scores, scores]), k)
        return top

    def _pages(self, positions: Shaped[Rows, "_"]) -> Iterator[Shaped[Rows, "_"]]:
        return (positions[part] for part in pieces(len(positions), page_rows(self.width + 1)))

    def _fetch(self, positions: Shaped[Rows, "n"]) -> Shaped[Vectors, "n D"]:
        """Return the vectors at positions, from this process or from the collection."""
        if not self._is_remote:
            return self._store.vectors[positions]
        rows, back = np.unique(self._store.rows[positions], return_inverse=True)
        found: Vectors = self._connection.fetch(self.collection, rows, self._engine_width)[back, : self.width]
        return found

    # Files

    def describe(self) -> MilvusDescription:
        options = self.options
        return MilvusDescription(
            **super().describe().model_dump(), type=options.type, uri=options.uri, alias=options.prefix,
            collection=self.collection, model=self.model, nlist=self._nlist,
        )  # fmt: skip

    def save(self, folder: Path) -> None:
        """Create the collection if necessary, and write its location and rows, not the vectors, into a folder."""
        if not self.collection:
            self._create_collection()
        super().save(folder)

    def _save_engine(self, folder: Path) -> None:
        np.save(folder / "rows.npy", self._store.rows)

    def restore(self, folder: Path, known: IndexDescription) -> None:
        self._store.load_rows(folder)
        self._set_description(known)

    def _set_description(self, facts: IndexDescription) -> None:
        assert isinstance(facts, MilvusDescription)
        super()._set_description(facts)
        if not facts.collection:
            raise ValueError("collection is empty")
        self._nlist, self.collection = max(1, facts.nlist), facts.collection
        self.model = facts.model
        self._is_remote = True

    def load_engine(self, folder: Path, verify: bool) -> None:
        """Raise CollectionError if the collection does not match the folder, Unavailable if Milvus does not answer."""
        name, client = f"{self.options.uri}: {self.collection}", self._connection
        width, descriptions = client.describe(self.collection)
        if width != self._engine_width:
            raise CollectionError(f"{name} has vectors of dimension {width}, expected {self._engine_width}", "mismatch")
        if self._description not in descriptions:
            raise CollectionError(
                f"{name} is described as {max(descriptions)!r}, expected {self._description!r}", "mismatch"
            )
        client.load(self.collection)
        if (n := client.count(self.collection)) != len(self):
            raise CollectionError(f"{name} holds {n:,} rows, expected {len(self):,}", "mismatch")
