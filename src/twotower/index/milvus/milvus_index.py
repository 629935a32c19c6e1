"""Approximate search in Milvus. ANN candidates are re-scored exactly with the vectors that Milvus returns with them.

The vectors are in this process while an index is built and tuned, and in a collection from `save` on. A collection is
created once, under a unique name, and never changed: a change of the index creates another one. If Milvus returns too few
candidates, because few rows are allowed or nearly all of the nearest are banned, all vectors are fetched and scored page
by page, so no answer is short.

With metric "dot" vectors are augmented as in `faiss.py` (Bachrach et al. 2014), and searched by L2 distance.
"""

from __future__ import annotations

import secrets
import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self, get_args

import numpy as np

from twotower import files
from twotower.arrays.sets import is_in_sorted
from twotower.arrays.types import Rows, Vectors
from twotower.errors import ConfigError, DataError, RunError, TwoTowerError
from twotower.files.readers import read_array
from twotower.index.exact import MAX_NORM, ExactIndex, SearchScope, complete_params
from twotower.index.milvus.client import MESSAGE_MAX_BYTES, CollectionError, MilvusConnection, page_rows
from twotower.index.protocol import Metric, MilvusLocation, MilvusType

INSERT_ROWS = 4096
BUILD_PARAMS: dict[MilvusType, dict[str, int]] = {
    "FLAT": {},
    "IVF_FLAT": {"nlist": 0},
    "IVF_SQ8": {"nlist": 0},
    "HNSW": {"m": 16, "ef_construction": 100},
}
SEARCH_PARAMS: dict[MilvusType, dict[str, int]] = {
    "FLAT": {},
    "IVF_FLAT": {"nprobe": 16},
    "IVF_SQ8": {"nprobe": 16, "refine": 2},
    "HNSW": {"ef": 64},
}
"""Build and search parameters of each index type, with their defaults."""


@dataclass(frozen=True)
class MilvusLimits:
    """Limits that decide how a search is made."""

    exact_max_rows: int = 1024
    """Number of allowed rows up to which their vectors are fetched and scored exactly."""
    named_max_rows: int = 16_384
    """Largest number of rows in a filter expression; with more allowed rows, hits outside them are dropped after the search."""
    max_hits: int = 16_384
    """Largest number of hits of one search, a limit of Milvus."""


class MilvusIndex(ExactIndex):
    """Index whose vectors are in a Milvus collection; implements `protocol.Index` approximately."""

    kind = "milvus"
    remote = True

    def __init__(self, width: int, metric: Metric, params: dict[str, int] | None, location: MilvusLocation) -> None:
        """Create an empty index. Raises ConfigError, DataError."""
        super().__init__(width, metric)
        if location.type not in BUILD_PARAMS:
            raise ConfigError(f"index.type is {location.type!r} (allowed: {', '.join(get_args(MilvusType))})")
        self.params = complete_params(f"milvus {location.type}", BUILD_PARAMS[location.type], params)
        self.search_params = dict(SEARCH_PARAMS[location.type])
        self.location = location
        self.collection = ""
        """Name of the collection; an empty string until it is created."""
        self.limits = MilvusLimits()
        self._nlist = 1
        self._is_remote = self._saved = False
        self._norm_bound = 0.0
        self._creation_lock = threading.Lock()
        self._cached_connection: MilvusConnection | None = None

    @classmethod
    def build(
        cls, vectors: Vectors, rows: Rows, metric: Metric, params: dict[str, int] | None = None,
        location: MilvusLocation | None = None,
    ) -> Self:  # fmt: skip
        if np.ndim(vectors) != 2:
            raise DataError(f"vectors have shape {np.shape(vectors)}, expected (N, D)")
        if location is None:
            raise ConfigError("index kind 'milvus' needs a location")
        index = cls(np.shape(vectors)[1], metric, params, location)
        index.add(rows, vectors)
        return index

    @property
    def model(self) -> str:
        """SHA-256 of the model that made the vectors."""
        return self.location.model

    @property
    def _connection(self) -> MilvusConnection:
        if self._cached_connection is None:
            self._cached_connection = client = MilvusConnection(
                self.location.uri, self.location.timeout, self.location.connect_timeout
            )
            weakref.finalize(self, client.close)
        return self._cached_connection

    @property
    def _description(self) -> str:
        """Description stored with a collection, to tell it from others."""
        return f"model {self.location.model or '-'}, {len(self)} vectors, {self.metric}"

    @property
    def _augmented(self) -> bool:
        return self.metric == "dot"

    @property
    def _milvus_metric(self) -> str:
        return "L2" if self._augmented else "COSINE"

    def search_limits(self) -> dict[str, int]:
        self._count_lists()
        limits = {"nprobe": self._nlist, "refine": 16, "ef": max(64, min(len(self), 4096))}
        return {name: limits[name] for name in self.search_params}

    # Changes

    def vectors(self, rows: Rows) -> Vectors:
        found = self._known(rows)
        return self._fetch(found) if self._is_remote else self._vectors[found]

    def scores(self, query: Vectors) -> Vectors:
        query = self._queries(query, 1)[0]
        parts = [self._fetch(at) @ query for at in self._pages(self._position)]
        found: Vectors = np.concatenate(parts) if parts else np.empty(0, np.float32)
        return found

    def add(self, rows: Rows, vectors: Vectors) -> None:
        self._download()
        super().add(rows, vectors)

    def update(self, rows: Rows, vectors: Vectors) -> None:
        self._download()
        super().update(rows, vectors)

    def remove(self, rows: Rows) -> None:
        self._download()
        super().remove(rows)

    def _download(self) -> None:
        """Fetch all vectors into this process, if they are only in the collection."""
        if self._is_remote:
            self._vectors, self._is_remote = self._fetch(np.arange(len(self._rows))), False

    def _changed(self, kept: int) -> None:
        if self.collection and not self._saved:
            self._connection.drop(self.collection)
        self.collection, self._saved = "", False
        self._count_lists()

    def _count_lists(self) -> None:
        if "nlist" in self.params and not self._is_remote:
            wanted = self.params["nlist"] or round(4 * len(self) ** 0.5)
            self._nlist = max(1, min(wanted, len(self) // 8, 65_536))

    def _create_collection(self) -> None:
        """Create a collection and insert the vectors. Raises RunError, Unavailable."""
        with self._creation_lock:
            if self.collection:
                return
            name = f"{self.location.prefix}_{datetime.now(UTC):%Y%m%dT%H%M%S}_{secrets.token_hex(4)}"
            self.location.on_create(name)
            self._norm_bound = 1.05 * self._max_norm
            self._connection.create_collection(name, self.width + self._augmented, self._description)
            step = min(INSERT_ROWS, page_rows(self.width + 1))
            for start in range(0, len(self), step):
                at = self._position[start : start + step]
                self._connection.insert(name, self._rows[at], self._engine_vectors(self._vectors[at]))
                files.point("milvus.inserted")
            params = {"nlist": self._nlist} if "nlist" in self.params else {}
            if "m" in self.params:
                params = {"M": max(2, self.params["m"]), "efConstruction": max(1, self.params["ef_construction"])}
            self._connection.build_index(name, self.location.type, self._milvus_metric, params)
            if (n := self._connection.count(name)) != len(self):
                raise RunError(f"{self.location.uri}: {name} holds {n:,} rows, {len(self):,} were inserted")
            self.collection = name

    def _engine_vectors(self, vectors: Vectors) -> Vectors:
        """Return vectors (n, D) as the collection stores them, augmented for metric "dot"."""
        if not self._augmented:
            return vectors
        squares = np.einsum("nd,nd->n", vectors, vectors, dtype=np.float64)
        last = np.sqrt(np.maximum(self._norm_bound**2 - squares, 0.0)).astype(np.float32)
        return np.column_stack([vectors, last])

    # Search

    def _search(self, queries: Vectors, k: int, scope: SearchScope, exact: bool) -> tuple[list[Rows], list[Vectors]]:
        max_hits = min(self.limits.max_hits, MESSAGE_MAX_BYTES // (4 * self.width))
        few = scope.only is not None and len(scope.only) <= self.limits.exact_max_rows
        exhaustive = self.search_params.get("ef", 0) >= len(self) > 0
        if exact or few or exhaustive or 4 * k > scope.remaining.max(initial=0) or k + max(8, k // 8) > max_hits:
            return self._scan(queries, k, scope)
        if not self.collection:
            self._create_collection()
        rows: list[Rows] = [np.empty(0, np.int64)] * len(queries)
        scores: list[Vectors] = [np.empty(0, np.float32)] * len(queries)
        todo = np.arange(len(queries))
        for factor, more, with_bans in (
            (1, 1, False),
            (4, 4, False),
            (16, 16, False),
            (16, 16, True),
            (16, max_hits, True),
        ):
            # An eighth more: float32 rounding in Milvus may exchange candidates near the k-th.
            fetch = min(len(self), max_hits, (k + max(8, k // 8)) * self.search_params.get("refine", 1) * more)
            if len(todo):
                todo = self._search_candidates(queries, k, scope, factor, fetch, with_bans, todo, rows, scores)
        if len(todo):
            banned = None if scope.banned is None else [scope.banned[i] for i in todo]
            rest = self._scan(queries[todo], k, SearchScope(scope.only, banned, scope.remaining[todo]))
            for number, found, score in zip(todo, *rest, strict=True):
                rows[number], scores[number] = found, score
        return rows, scores

    def _search_candidates(
        self, queries: Vectors, k: int, scope: SearchScope, factor: int, fetch: int, with_bans: bool, todo: Rows,
        rows: list[Rows], scores: list[Vectors],
    ) -> Rows:  # fmt: skip
        """Fill `rows` and `scores` of the queries `todo` from re-scored candidates; return the queries with too few.

        Up to `named_max_rows` allowed rows are named in the filter. Banned hits are dropped after the search; only
        `with_bans` names each query's banned rows in its filter.
        """
        params: dict[str, int] = {}
        if "nprobe" in self.search_params:
            params = {"nprobe": min(self._nlist, self.search_params["nprobe"] * factor)}
        if "ef" in self.search_params:
            params = {"ef": max(fetch, min(self.search_params["ef"] * factor, 32_768))}
        only = scope.only
        named = None if only is None or len(only) > self.limits.named_max_rows else np.sort(self._rows[only])
        augmented = queries if not self._augmented else np.column_stack([queries, np.zeros(len(queries), np.float32)])
        step = (
            1
            if with_bans
            else max(1, min(1024, MESSAGE_MAX_BYTES // (4 * fetch * (self.width + 1)), self.limits.max_hits // fetch))
        )
        short = []
        for start in range(0, len(todo), step):
            some = todo[start : start + step]
            banned = None
            if with_bans and scope.banned is not None and len(scope.banned[some[0]]) <= self.limits.named_max_rows:
                banned = np.sort(self._rows[scope.banned[some[0]]])
            hits = self._connection.search(
                self.collection, augmented[some], fetch, params, self._milvus_metric, named, banned, self._is_remote
            )  # fmt: skip
            for number, hit in zip(some.tolist(), hits, strict=True):
                found = np.array([h["row"] for h in hit], np.int64)
                at = self._find(found)
                good = at >= 0
                if only is not None and named is None:
                    good &= is_in_sorted(only, at)
                if scope.banned is not None:
                    good &= ~is_in_sorted(scope.banned[number], at)
                if self._is_remote:
                    chosen = np.flatnonzero(good)
                    vectors = np.array([hit[i]["entity"]["vector"] for i in chosen], np.float32)
                    vectors = vectors.reshape(len(chosen), self.width + self._augmented)[:, : self.width]
                else:
                    vectors = self._vectors[at[good]]
                rows[number], scores[number] = _best_rows(found[good], vectors, queries[number], k)
                if len(rows[number]) < min(k, scope.remaining[number]):
                    short.append(number)
        return np.asarray(short, np.int64)

    def _scan(self, queries: Vectors, k: int, scope: SearchScope) -> tuple[list[Rows], list[Vectors]]:
        """Search exactly, with vectors fetched page by page if they are only in the collection."""
        if not self._is_remote:
            return super()._scan(queries, k, scope)
        banned = None if scope.banned is None else [self._rows[b] for b in scope.banned]
        rows = np.full((len(queries), 0), -1, np.int64)
        scores = np.full((len(queries), 0), -np.inf, np.float32)
        for at in self._pages(self._position if scope.only is None else scope.only):
            part = ExactIndex.build(self._fetch(at), self._rows[at], self.metric)
            part.threads = self.threads
            found, score = part.search(queries, k, banned=banned)
            rows, scores = np.column_stack([rows, found]), np.column_stack([scores, score])
            order = np.lexsort((np.where(rows < 0, np.iinfo(np.int64).max, rows), -scores))[:, :k]
            rows, scores = np.take_along_axis(rows, order, 1), np.take_along_axis(scores, order, 1)
        kept = [line >= 0 for line in rows]
        return [r[keep] for r, keep in zip(rows, kept, strict=True)], [
            s[keep] for s, keep in zip(scores, kept, strict=True)
        ]

    def _pages(self, positions: Rows) -> Iterator[Rows]:
        step = page_rows(self.width + 1)
        for start in range(0, len(positions), step):
            yield positions[start : start + step]

    def _fetch(self, positions: Rows) -> Vectors:
        """Return the vectors (n, D) at positions (n,), from this process or from the collection."""
        if not self._is_remote:
            return self._vectors[positions]
        rows, back = np.unique(self._rows[positions], return_inverse=True)
        found: Vectors = self._connection.fetch(self.collection, rows, self.width + self._augmented)[back, : self.width]
        return found

    # Files

    def describe(self) -> dict[str, Any]:
        location = self.location
        return super().describe() | {
            "type": location.type, "uri": location.uri, "alias": location.prefix, "collection": self.collection,
            "model": location.model, "nlist": self._nlist, "norm_bound": self._norm_bound,
        }  # fmt: skip

    def save(self, folder: Path) -> None:
        """Create the collection if necessary, and write its location, without the vectors, into a folder."""
        if not self.collection:
            self._create_collection()
        super().save(folder)
        self._saved = True

    def _save_vectors(self, folder: Path) -> None:
        np.save(folder / "rows.npy", self._sorted)

    @classmethod
    def restore(cls, folder: Path, facts: dict[str, Any], mmap: bool, verify: bool) -> Self:
        """Load the index of a folder; `facts` is the content of its `index.json`.

        Raises RunError, CollectionError if the collection does not match, Unavailable if Milvus does not answer.
        """
        try:
            names = ("uri", "alias", "collection", "model")
            if not all(isinstance(facts[name], str) for name in names) or not facts["collection"]:
                raise ValueError(f"{', '.join(names)} must be texts, and collection not empty")
            location = MilvusLocation(facts["uri"], facts["alias"], facts["type"], model=facts["model"])
            params = {str(n): int(v) for n, v in facts["params"].items()}
            index = cls(int(facts["width"]), facts["metric"], params, location)
            index.search_params = {name: max(1, int(facts["search_params"][name])) for name in index.search_params}
            index._nlist, index._norm_bound = max(1, int(facts["nlist"])), float(facts["norm_bound"])
            index._max_norm = float(facts["max_norm"])
            if not 0 <= index._max_norm <= MAX_NORM:
                raise ValueError(f"max_norm: {index._max_norm}")
            index._rejected = np.asarray(facts["rejected"], np.int64).reshape(-1)
            rows = read_array(folder / "rows.npy")
            if rows.dtype != np.int64 or rows.ndim != 1 or len(rows) != facts["n"] or (np.diff(rows) <= 0).any():
                raise ValueError("rows are repeated, missing or of the wrong kind")
            if len(rows) and rows[0] < 0:
                raise ValueError(f"row {rows[0]}")
        except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, OverflowError, TwoTowerError) as e:
            raise RunError(f"{folder}: not a usable index ({e})") from e
        index._rows, index._sorted, index._position = rows, rows, np.arange(len(rows))
        index._identity = bool(len(rows) == 0 or rows[-1] == len(rows) - 1)
        index.collection, index._is_remote, index._saved = facts["collection"], True, True
        index._check()
        return index

    def _check(self) -> None:
        """Raise CollectionError if the collection does not match the folder, Unavailable if Milvus does not answer."""
        name, client = f"{self.location.uri}: {self.collection}", self._connection
        width, descriptions = client.describe(self.collection)
        if width != self.width + self._augmented:
            raise CollectionError(
                f"{name} has vectors of dimension {width}, expected {self.width + self._augmented}", "mismatch"
            )
        if self._description not in descriptions:
            raise CollectionError(
                f"{name} is described as {max(descriptions)!r}, expected {self._description!r}", "mismatch"
            )
        client.load(self.collection)
        if (n := client.count(self.collection)) != len(self):
            raise CollectionError(f"{name} holds {n:,} rows, expected {len(self):,}", "mismatch")


def _best_rows(rows: Rows, vectors: Vectors, query: Vectors, k: int) -> tuple[Rows, Vectors]:
    """Return the rows and exact scores of the `k` best of vectors (n, D), in descending order."""
    scores = (vectors * query.astype(np.float64)).sum(axis=1).astype(np.float32)
    order = np.lexsort((rows, -scores))[:k]
    return rows[order], scores[order]
