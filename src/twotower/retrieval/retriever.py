"""Retrieval from a published bundle: the items with the highest scores for a user, by two methods.

Method 1 looks up the precomputed user vector. Method 2 runs the user tower online on the features and the history of
the request. Both search the same index, so a user without changes gets the same answer by both. Serving and the
evaluation of a bundle use this class. The tower is an ONNX graph, so torch is not needed.
"""

from __future__ import annotations

import time
import weakref
from collections import abc
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, Unpack

import numpy as np
import polars as pl

from twotower.arrays.types import Floats, ItemId, UserId, UserRow
from twotower.data.reading.readers import TableLike
from twotower.errors import DataError, RunError
from twotower.escaping import representation
from twotower.evaluation.own_items import OwnItems
from twotower.features.schema import Schema
from twotower.files import layout
from twotower.index.vector_store import MAX_NORM
from twotower.onnx.tower import INSPECT_SECONDS, GateInfo, InspectionLimits
from twotower.retrieval.batches import BatchOptions, recommend_batch
from twotower.retrieval.catalogue import Catalogue, Neighbours, Popularity
from twotower.retrieval.event import Event, history_rows
from twotower.retrieval.filters import CatalogueFilters
from twotower.retrieval.loaded_bundle import LoadedBundle, naming_damage
from twotower.retrieval.query import Query, QueryReader
from twotower.retrieval.request import (
    Answer,
    Method,
    Request,
    Source,
    UnknownId,
    check_method,
    checked_k,
    text_request,
)
from twotower.retrieval.request_body import Json
from twotower.retrieval.user_inputs import UserInputs
from twotower.store.bundle import Bundle
from twotower.store.store import Store


class UserVector(NamedTuple):
    """The vector that a request is searched with."""

    vector: Floats  # (1, D)
    source: Source
    unknown: list[str]
    """As in `Answer`."""


class Retriever:
    """A loaded bundle that answers requests."""

    def __init__(
        self, bundle: Bundle, threads: int = 1, tower_memory: int | None = None,
        inspect_seconds: float = INSPECT_SECONDS,
    ) -> None:  # fmt: skip
        """Load a bundle that `Bundle.open` has verified.

        A child process first loads the FAISS file and the towers, unless the same content has passed this before:
        towers with `tower_memory` bytes, and `inspect_seconds` of processor time in addition to the time for their
        size. Raises RunError or BundleError if files are damaged or inconsistent, Unavailable if the server
        of the index does not answer.
        """
        limits = InspectionLimits(cpu_seconds=inspect_seconds, max_memory=tower_memory)
        with ExitStack() as held:
            held.enter_context(bundle.lease())  # until all files are open or read, so that gc cannot remove them
            with naming_damage(bundle.folder):
                self.loaded = loaded = LoadedBundle.load(bundle, threads, limits)
                self.bundle, self.dataset, self.index = bundle, loaded.dataset, loaded.index
                self.user_ids, self.item_ids, self.titles = loaded.user_ids, loaded.item_ids, loaded.titles
                self.history_scores = loaded.history_scores
                self.catalogue = Catalogue(self.index, self.item_ids, self.titles, bundle.id)
                self.user_inputs = UserInputs(self.dataset, loaded.columns)
                self.reads_context = bool(self.schema.side("context"))
                """True if the user tower reads features of the context."""
                self.queries = QueryReader(self.dataset, self.user_ids, self.item_ids)
                self.filters = CatalogueFilters(
                    self.dataset.items.frame, self.item_ids, self.schema, self.dataset.interacted_items
                )
                self.popularity = Popularity(self.dataset.item_positive_counts, loaded.popularity)
                self.neighbours = Neighbours(self.index, bundle.manifest.bias, bundle.manifest.similarity)
            if (row := self.neighbours.broken_row) is not None:
                raise RunError(f"{bundle.folder / layout.INDEX}: damaged (the vector of item row {row} is not finite)")
            if self.index.remote:  # gc drops a collection with its bundle
                weakref.finalize(self, held.pop_all().close)

    def __repr__(self) -> str:
        return representation(type(self), f"{self.bundle!r}, index {self.index.kind}")

    @property
    def schema(self) -> Schema:
        return self.dataset.schema

    @property
    def user_columns(self) -> list[str]:
        """Columns allowed in the `features` of a request."""
        return self.user_inputs.columns

    @property
    def context_columns(self) -> list[str]:
        """Columns allowed in the `context` of a request."""
        return self.user_inputs.context.columns

    def usual_method(self, request: Request | Query) -> Method:
        """Return the method of a request without one: 2 (online user tower) if it has more than a user id or the tower
        reads a context, else 1 (precomputed user vectors)."""
        return 2 if self.query(request).has_details or self.reads_context else 1

    @property
    def item_columns(self) -> list[str]:
        """Columns allowed in `where`."""
        return self.filters.columns

    def keeps_seen(self, keep_seen: bool | None) -> bool:
        """Return True if answers may contain items of their user's history. None: the bundle's default."""
        return self.bundle.manifest.keep_seen if keep_seen is None else bool(keep_seen)

    def has_user(self, user_id: str) -> bool:
        """Return True if the user is in the bundle."""
        return self.user_ids.row(UserId(user_id)) is not None

    def unknown_items(self, items: Iterable[str]) -> list[str]:
        """Return the distinct item ids that are not in the bundle."""
        distinct = [ItemId(i) for i in dict.fromkeys(items)]
        return [i for i, row in zip(distinct, self.item_ids.rows(distinct), strict=True) if row < 0]

    def query(self, request: Request | Query, recent: abc.Sequence[Event] = ()) -> Query:
        """Return a request as this bundle reads it, with the `recent` events of its user, oldest first; a query as it
        is. Recent events are sorted into the stored history by their times, unless the request replaces it.

        Raises DataError for a type of an event without a rule, unless the event is recent."""
        if isinstance(request, Query):
            return request
        return self.queries.read(request, recent)

    def recommend(
        self, request: Request | Query, k: int = 10, method: Method = 1, *, allow: abc.Sequence[str] | None = None,
        ban: abc.Sequence[str] = (), where: Mapping[str, str] | None = None, keep_seen: bool | None = None,
        vector: Floats | None = None, fallback: bool = False,
    ) -> Answer:  # fmt: skip
        """Return the `k` items with the highest scores for a user.

        Items that the user has seen are left out, unless `keep_seen`. None is the bundle's default: it keeps them if
        its run has `evaluation.repeats` "allow" or "only".

        `allow` and `ban` are item ids; `where` requires an item column to equal a value, or to contain it (a column of
        lists). An unknown user gets the tower's vector of the request's values (source "cold_start"), or the most
        popular items if it has none ("popular"). `vector` (1, D) replaces the vector of `embed_request`. `fallback`
        answers with the most popular items without a search ("fallback"). Raises DataError for an invalid argument,
        Unavailable if the server of the index does not answer.
        """
        started = time.perf_counter()
        k = checked_k(k)
        check_method(method)
        query = self.query(request)
        excluded = self.filters.excluded(self.filters.banned(ban), query, self.keeps_seen(keep_seen))
        allowed = self.filters.allowed(allow, where)
        source: Source = "fallback" if fallback else query.source
        unknown: list[str] = []
        if fallback or (vector is None and source == "popular"):
            ranked = self.popularity.top(k, excluded, allowed)
        else:
            if vector is None:
                vector, _, unknown = self.embed_request(query, method)
            elif source == "popular":
                source = "cold_start"
            ranked = self.catalogue.rank(vector, k, excluded, allowed, self.own_items(query, method))
        return self.catalogue.answer(ranked, k, started, method, source, unknown)

    def own_items(self, query: Query, method: Method) -> OwnItems | None:
        """Return what the history of a query, by method 1 the stored one, adds to the scores of its items. None: the
        model has no such term."""
        if (own := self.history_scores) is None:
            return None
        if query.user is not None and (method == 1 or not query.has_details):
            return own.of_users(np.array([query.user]))[0]
        return own.of_codes(self.user_inputs.history(own.term.history, query))

    def recommend_frame(
        self, users: TableLike, k: int = 100, method: Method = 1, **options: Unpack[BatchOptions]
    ) -> pl.DataFrame:
        """Return `twotower.retrieval.batches.recommend_batch` of the users of a table: rows of user_id, rank, item_id,
        score and source. Raises DataError, ConfigError, Unavailable."""
        return recommend_batch(self, users, k, method, **options)

    def embed_request(self, request: Request | Query, method: Method = 2) -> UserVector:
        """Return the vector that `recommend` searches with.

        For a user without data (source "popular") `recommend` does not search; the vector is the tower's for empty
        inputs. Raises DataError as `recommend` does.
        """
        check_method(method)
        query = self.query(request)
        if method == 2 or query.user is None:
            given = self.user_inputs.read(query)
            vector = self.loaded.tower(given.feed)
            check_vector(vector)
            return UserVector(vector, query.source, given.unknown)
        for what, values in (("features", query.request.features), ("context", query.request.context)):
            if values:
                raise DataError(
                    f"request: method 1 (precomputed user vectors) takes no {what}, and user "
                    f"'{query.request.user_id}' has some; use method 2, or leave the {what} out"
                )
        return UserVector(self.loaded.stored_vectors(slice(query.user, query.user + 1)), query.source, [])

    def search(
        self, text: str, k: int = 10, feature: str = "", *, context: Mapping[str, Json] | None = None,
        allow: abc.Sequence[str] | None = None, ban: abc.Sequence[str] = (), where: Mapping[str, str] | None = None,
    ) -> Answer:  # fmt: skip
        """Return the `k` items with the highest scores for the user tower's vector of a text and a `context`.

        `feature` names a text feature of the user tower, and is required if text features read several columns. The
        filters are the same as in `recommend`. If the model knows none of the text's n-grams, the answer is the most
        popular items (source "popular"), and `unknown` names the features. Raises DataError for an unknown feature or a
        text without a word.
        """
        request, n_features = text_request(text, self.schema, feature, context)
        answer = self.recommend(request, k, 2, allow=allow, ban=ban, where=where)
        if len(answer.unknown) < n_features:
            return replace(answer, source="model")
        popular = self.recommend(Request(), k, 2, allow=allow, ban=ban, where=where)
        return replace(popular, unknown=answer.unknown)

    def similar(self, item_id: str, k: int = 10) -> Answer:
        """Return the `k` items with the highest cosine to an item, without the bias columns.

        Raises UnknownId for an unknown item, DataError for one without a vector, Unavailable.
        """
        started = time.perf_counter()
        k = checked_k(k)
        row = self.item_ids.row(ItemId(str(item_id)))
        if row is None:
            raise UnknownId(f"item '{item_id}' is not among the {len(self.item_ids):,} items of this bundle")
        nearest = self.neighbours.nearest(row, k)
        if nearest is None:
            raise DataError(f"item '{item_id}' has no vector (the index rejected it: not finite, or of norm 0)")
        return self.catalogue.answer(nearest, k, started)


def current_retriever(store: Path | str) -> Retriever:
    """Return a retriever of the current bundle of a store. Raises RunError if no bundle is current, or it is
    damaged."""
    return Retriever(Store(store).current())


def check_vector(vector: Floats) -> None:
    """Raise DataError unless the norm of a tower's vector is below MAX_NORM."""
    if not np.linalg.norm(vector.astype(np.float64)) < MAX_NORM:
        raise DataError("request: the user tower's vector is not finite; use smaller numbers in the features")


@dataclass(frozen=True)
class Explanation:
    """The vector that an answer was searched with, and the SENet gates of the user tower."""

    vector: Floats  # (1, D)
    gates: list[tuple[GateInfo, Floats]]
    """Each gate with its weights (fields,)."""


def explain(retriever: Retriever, request: Request | Query, method: Method = 2) -> Explanation:
    """Explain the answer that `recommend` gives to a request. Raises DataError as `recommend` does."""
    check_method(method)
    query, tower = retriever.query(request), retriever.loaded.tower
    stored = retriever.embed_request(query, method).vector if method == 1 and query.user is not None else None
    vector, weights = tower.explain(retriever.user_inputs.read(query).feed)
    check_vector(vector)
    return Explanation(
        vector if stored is None else stored, [(gate, w[0]) for gate, w in zip(tower.gates, weights, strict=True)]
    )


class HistoryItem(NamedTuple):
    """An interaction of a user."""

    id: ItemId
    title: str
    liked: bool | None
    """None for an interaction of weight 0, such as an input event."""


def stored_history(retriever: Retriever, user_id: str, n: int) -> list[HistoryItem]:
    """Return the last `n` interactions of a user, oldest first, without the test part. Raises UnknownId."""
    rows = history_rows(retriever.dataset, _user_row(retriever, user_id))
    pairs = retriever.dataset.pairs.take(rows[max(0, len(rows) - n) :])
    columns = (column.tolist() for column in (pairs.item, pairs.positive, pairs.weight))
    return [
        HistoryItem(retriever.item_ids[i], retriever.titles[i], x if w else None)
        for i, x, w in zip(*columns, strict=True)
    ]


def stored_features(retriever: Retriever, user_id: str) -> dict[str, Json]:
    """Return the stored features of a user. Raises UnknownId."""
    row = retriever.dataset.users.frame.row(_user_row(retriever, user_id), named=True)
    return {name: row[name] for name in retriever.user_columns}


def stored_items(retriever: Retriever, user_id: str) -> list[ItemId]:
    """Return the ids of the items that a user has seen. Raises UnknownId."""
    rows = retriever.dataset.interacted_items.row(_user_row(retriever, user_id))
    items: list[ItemId] = retriever.item_ids.column.gather(rows).unique(maintain_order=True).to_list()
    return items


def _user_row(retriever: Retriever, user_id: str) -> UserRow:
    row = retriever.user_ids.row(UserId(str(user_id)))
    if row is None:
        raise UnknownId(f"user '{user_id}' is not among the {len(retriever.user_ids):,} users of this bundle")
    return row
