"""Milvus proposes, the vectors decide: candidates of a collection, scored again with the vectors they come with.

The vectors are here while an index is built and judged, and in a collection from then on. A collection is made once,
under a name that is never used again, and not changed: an index that is changed makes another. What Milvus does not find,
because few rows are allowed or nearly all of the best are banned, is scored page by page, so an answer is never short.

For "dot" vectors are lifted as in `faiss.py`, and searched by L2.
"""

from __future__ import annotations

import secrets
import threading
import weakref
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self, get_args

import numpy as np

from twotower import files
from twotower.embeddings_folder import array
from twotower.errors import ConfigError, DataError, RunError, TwoTowerError
from twotower.index.exact import MAX_NORM, ExactIndex, SearchScope, complete_params, is_in_sorted
from twotower.index.milvus.client import MESSAGE_MAX_BYTES, CollectionError, MilvusConnection, page_rows
from twotower.index.protocol import Metric, MilvusLocation, MilvusType, Rows, Vectors

EXACT_MAX_ROWS = 1024
"""So many allowed rows are scored exactly: their vectors are fetched."""
NAMED_MAX_ROWS = 16_384
"""So many rows are named in a search; of more that are allowed, some of the best are likely to be."""
MAX_HITS = 16_384
"""Milvus gives no more hits than that."""
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
"""What can be set of each type when it is built, and when it is searched."""


class MilvusIndex(ExactIndex):
    """A collection of Milvus. Approximate, but for the promises of `protocol.Index`."""

    kind = "milvus"
    remote = True

    def __init__(self, width: int, metric: Metric, params: dict[str, int] | None, place: MilvusLocation) -> None:
        """An empty index. Raises ConfigError, DataError."""
        super().__init__(width, metric)
        if place.type not in BUILD_PARAMS:
            raise ConfigError(f"index.type is {place.type!r} (allowed: {', '.join(get_args(MilvusType))})")
        self.params = complete_params(f"milvus {place.type}", BUILD_PARAMS[place.type], params)
        self.effort = dict(SEARCH_PARAMS[place.type])
        self.place = place
        self.collection = ""
        """Where the vectors are; an empty string while they are only here."""
        self._n_lists = 1
        self._away = self._saved = False
        self._radius = 0.0
        self._making = threading.Lock()
        self._client_: MilvusConnection | None = None

    @classmethod
    def build(
        cls, vectors: Vectors, rows: Rows, metric: Metric, params: dict[str, int] | None = None,
        place: MilvusLocation | None = None,
    ) -> Self:  # fmt: skip
        if np.ndim(vectors) != 2:
            raise DataError(f"vectors must be (N, D), not of shape {np.shape(vectors)}")
        if place is None:
            raise ConfigError("index: 'milvus' needs a place")
        index = cls(np.shape(vectors)[1], metric, params, place)
        index.add(rows, vectors)
        return index

    @property
    def model(self) -> str:
        """The digest of the model whose vectors they are."""
        return self.place.model

    @property
    def _client(self) -> MilvusConnection:
        if self._client_ is None:
            self._client_ = client = MilvusConnection(self.place.uri, self.place.timeout)
            weakref.finalize(self, client.close)
        return self._client_

    @property
    def _told(self) -> str:
        """What a collection says of itself, so that it is not taken for another."""
        return f"model {self.place.model or '-'}, {len(self)} vectors, {self.metric}"

    @property
    def _lifted(self) -> bool:
        return self.metric == "dot"

    @property
    def _measure(self) -> str:
        return "L2" if self._lifted else "COSINE"

    def most(self) -> dict[str, int]:
        self._lists()
        tops = {"nprobe": self._n_lists, "refine": 16, "ef": max(64, min(len(self), 4096))}
        return {name: tops[name] for name in self.effort}

    # Changing

    def vectors(self, rows: Rows) -> Vectors:
        found = self._known(rows)
        return self._fetched(found) if self._away else self._vectors[found]

    def products(self, query: Vectors) -> Vectors:
        query = self._queries(query, 1)[0]
        parts = [self._fetched(at) @ query for at in self._pages(self._position)]
        found: Vectors = np.concatenate(parts) if parts else np.empty(0, np.float32)
        return found

    def add(self, rows: Rows, vectors: Vectors) -> None:
        self._bring()
        super().add(rows, vectors)

    def update(self, rows: Rows, vectors: Vectors) -> None:
        self._bring()
        super().update(rows, vectors)

    def remove(self, rows: Rows) -> None:
        self._bring()
        super().remove(rows)

    def _bring(self) -> None:
        """Have the vectors here."""
        if self._away:
            self._vectors, self._away = self._fetched(np.arange(len(self._rows))), False

    def _changed(self, kept: int) -> None:
        if self.collection and not self._saved:
            self._client.drop(self.collection)
        self.collection, self._saved = "", False
        self._lists()

    def _lists(self) -> None:
        if "nlist" in self.params and not self._away:
            wanted = self.params["nlist"] or round(4 * len(self) ** 0.5)
            self._n_lists = max(1, min(wanted, len(self) // 8, 65_536))

    def _make(self) -> None:
        """Put the vectors into a collection of their own. Raises RunError, Unavailable."""
        with self._making:
            if self.collection:
                return
            name = f"{self.place.prefix}_{datetime.now(UTC):%Y%m%dT%H%M%S}_{secrets.token_hex(4)}"
            self.place.announce(name)
            self._radius = 1.05 * self._longest
            self._client.create(name, self.width + self._lifted, self._told)
            step = min(INSERT_ROWS, page_rows(self.width + 1))
            for start in range(0, len(self), step):
                at = self._position[start : start + step]
                self._client.insert(name, self._rows[at], self._items(self._vectors[at]))
                files.point()
            built = {"nlist": self._n_lists} if "nlist" in self.params else {}
            if "m" in self.params:
                built = {"M": max(2, self.params["m"]), "efConstruction": max(1, self.params["ef_construction"])}
            self._client.finish(name, self.place.type, self._measure, built)
            if (n := self._client.count(name)) != len(self):
                raise RunError(f"{self.place.uri}: {name} holds {n:,} rows, {len(self):,} were put in")
            self.collection = name

    def _items(self, vectors: Vectors) -> Vectors:
        """Vectors as the collection holds them."""
        if not self._lifted:
            return vectors
        squares = np.einsum("nd,nd->n", vectors, vectors, dtype=np.float64)
        last = np.sqrt(np.maximum(self._radius**2 - squares, 0.0)).astype(np.float32)
        return np.column_stack([vectors, last])

    # Searching

    def _search(self, queries: Vectors, k: int, scope: SearchScope, exact: bool) -> tuple[list[Rows], list[Vectors]]:
        most = min(MAX_HITS, MESSAGE_MAX_BYTES // (4 * self.width))
        few = scope.only is not None and len(scope.only) <= EXACT_MAX_ROWS
        wide = self.effort.get("ef", 0) >= len(self) > 0
        if exact or few or wide or 4 * k > scope.remaining.max(initial=0) or k + max(8, k // 8) > most:
            return self._scan(queries, k, scope)
        if not self.collection:
            self._make()
        rows: list[Rows] = [np.empty(0, np.int64)] * len(queries)
        scores: list[Vectors] = [np.empty(0, np.float32)] * len(queries)
        todo = np.arange(len(queries))
        for harder, more, named in ((1, 1, False), (4, 4, False), (16, 16, False), (16, 16, True), (16, most, True)):
            # An eighth more: Milvus rounds in float32, which matters between the last and the next.
            fetch = min(len(self), most, (k + max(8, k // 8)) * self.effort.get("refine", 1) * more)
            if len(todo):
                todo = self._propose(queries, k, scope, harder, fetch, named, todo, rows, scores)
        if len(todo):
            banned = None if scope.banned is None else [scope.banned[i] for i in todo]
            rest = self._scan(queries[todo], k, SearchScope(scope.only, banned, scope.remaining[todo]))
            for number, found, score in zip(todo, *rest, strict=True):
                rows[number], scores[number] = found, score
        return rows, scores

    def _propose(
        self, queries: Vectors, k: int, scope: SearchScope, harder: int, fetch: int, named: bool, todo: Rows,
        rows: list[Rows], scores: list[Vectors],
    ) -> Rows:  # fmt: skip
        """Fill in `rows` and `scores` of the queries `todo`; returns those that have too few.

        Rows that are allowed are named in the search if they are few enough. What is banned comes with the others, and
        is left out; only if that was not enough, each query names its own.
        """
        params: dict[str, int] = {}
        if "nprobe" in self.effort:
            params = {"nprobe": min(self._n_lists, self.effort["nprobe"] * harder)}
        if "ef" in self.effort:
            params = {"ef": max(fetch, min(self.effort["ef"] * harder, 32_768))}
        only = scope.only
        listed = None if only is None or len(only) > NAMED_MAX_ROWS else np.sort(self._rows[only])
        wide = queries if not self._lifted else np.column_stack([queries, np.zeros(len(queries), np.float32)])
        step = 1 if named else max(1, min(1024, MESSAGE_MAX_BYTES // (4 * fetch * (self.width + 1)), MAX_HITS // fetch))
        short = []
        for start in range(0, len(todo), step):
            some = todo[start : start + step]
            without = None
            if named and scope.banned is not None and len(scope.banned[some[0]]) <= NAMED_MAX_ROWS:
                without = np.sort(self._rows[scope.banned[some[0]]])
            hits = self._client.search(
                self.collection, wide[some], fetch, params, self._measure, listed, without, self._away
            )  # fmt: skip
            for number, hit in zip(some.tolist(), hits, strict=True):
                found = np.array([h["row"] for h in hit], np.int64)
                at = self._find(found)
                good = at >= 0
                if only is not None and listed is None:
                    good &= is_in_sorted(only, at)
                if scope.banned is not None:
                    good &= ~is_in_sorted(scope.banned[number], at)
                if self._away:
                    chosen = np.flatnonzero(good)
                    vectors = np.array([hit[i]["entity"]["vector"] for i in chosen], np.float32)
                    vectors = vectors.reshape(len(chosen), self.width + self._lifted)[:, : self.width]
                else:
                    vectors = self._vectors[at[good]]
                rows[number], scores[number] = _best_rows(found[good], vectors, queries[number], k)
                if len(rows[number]) < min(k, scope.remaining[number]):
                    short.append(number)
        return np.asarray(short, np.int64)

    def _scan(self, queries: Vectors, k: int, scope: SearchScope) -> tuple[list[Rows], list[Vectors]]:
        """Exact, a page of vectors at a time where they are not here."""
        if not self._away:
            return super()._scan(queries, k, scope)
        banned = None if scope.banned is None else [self._rows[b] for b in scope.banned]
        rows = np.full((len(queries), 0), -1, np.int64)
        scores = np.full((len(queries), 0), -np.inf, np.float32)
        for at in self._pages(self._position if scope.only is None else scope.only):
            part = ExactIndex.build(self._fetched(at), self._rows[at], self.metric)
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

    def _fetched(self, positions: Rows) -> Vectors:
        """The vectors (n, D) at positions (n,), wherever they are."""
        if not self._away:
            return self._vectors[positions]
        rows, back = np.unique(self._rows[positions], return_inverse=True)
        found: Vectors = self._client.vectors(self.collection, rows, self.width + self._lifted)[back, : self.width]
        return found

    # Files

    def describe(self) -> dict[str, Any]:
        place = self.place
        return super().describe() | {
            "type": place.type, "uri": place.uri, "alias": place.prefix, "collection": self.collection,
            "model": place.model, "lists": self._n_lists, "radius": self._radius,
        }  # fmt: skip

    def save(self, folder: Path) -> None:
        """Write where the vectors are, not the vectors."""
        if not self.collection:
            self._make()
        super().save(folder)
        self._saved = True

    def _save_vectors(self, folder: Path) -> None:
        np.save(folder / "rows.npy", self._sorted)

    @classmethod
    def restore(cls, folder: Path, said: dict[str, Any], mmap: bool, verify: bool) -> Self:
        """The index of a folder whose `index.json` says `said`. Raises RunError, CollectionError if the collection is
        another, Unavailable if it cannot be asked."""
        try:
            names = ("uri", "alias", "collection", "model")
            if not all(isinstance(said[name], str) for name in names) or not said["collection"]:
                raise ValueError(f"{', '.join(names)} must be texts")
            place = MilvusLocation(said["uri"], said["alias"], said["type"], model=said["model"])
            params = {str(n): int(v) for n, v in said["params"].items()}
            index = cls(int(said["width"]), said["metric"], params, place)
            index.effort = {name: max(1, int(said["effort"][name])) for name in index.effort}
            index._n_lists, index._radius = max(1, int(said["lists"])), float(said["radius"])
            index._longest = float(said["longest"])
            if not 0 <= index._longest <= MAX_NORM:
                raise ValueError(f"longest: {index._longest}")
            index._rejected = np.asarray(said["rejected"], np.int64).reshape(-1)
            rows = array(folder / "rows.npy")
            if rows.dtype != np.int64 or rows.ndim != 1 or len(rows) != said["n"] or (np.diff(rows) <= 0).any():
                raise ValueError("rows are repeated, missing or of the wrong kind")
            if len(rows) and rows[0] < 0:
                raise ValueError(f"row {rows[0]}")
        except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, OverflowError, TwoTowerError) as e:
            raise RunError(f"{folder}: not a usable index ({e})") from e
        index._rows, index._sorted, index._position = rows, rows, np.arange(len(rows))
        index._plain = bool(len(rows) == 0 or rows[-1] == len(rows) - 1)
        index.collection, index._away, index._saved = said["collection"], True, True
        index._check()
        return index

    def _check(self) -> None:
        """Raises CollectionError if the collection is not what the folder says, Unavailable if it cannot be asked."""
        name, client = f"{self.place.uri}: {self.collection}", self._client
        width, told = client.facts(self.collection)
        if width != self.width + self._lifted:
            raise CollectionError(
                f"{name} has vectors of {width} numbers, the bundle's have {self.width + self._lifted}", "mismatch"
            )
        if self._told not in told:
            raise CollectionError(f"{name} says {max(told)!r}, the bundle {self._told!r}", "mismatch")
        client.load(self.collection)
        if (n := client.count(self.collection)) != len(self):
            raise CollectionError(f"{name} holds {n:,} rows, the bundle says {len(self):,}", "mismatch")


def _best_rows(rows: Rows, vectors: Vectors, query: Vectors, k: int) -> tuple[Rows, Vectors]:
    """Rows and scores of the best `k`, as every index scores and orders them."""
    scores = (vectors * query.astype(np.float64)).sum(axis=1).astype(np.float32)
    order = np.lexsort((rows, -scores))[:k]
    return rows[order], scores[order]
