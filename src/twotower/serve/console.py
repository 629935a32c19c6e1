"""Data of the console at /: users, items, bundles, explained answers, and the map of item vectors.

Only the console's page reads these replies, so the OpenAPI document leaves out their fields."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from weakref import WeakKeyDictionary

import numpy as np
import polars as pl

from twotower.arrays.types import Doubles, Floats, Ints, ItemId
from twotower.data.ids import UserIds
from twotower.features.feature import Feature
from twotower.features.values import canonical_ids
from twotower.retrieval.event import Event, ReadEvent
from twotower.retrieval.query import Query
from twotower.retrieval.request import MAX_K, Answer
from twotower.retrieval.request_body import Json
from twotower.retrieval.retriever import Retriever, explain, stored_features, stored_history, stored_items
from twotower.serve import schemas
from twotower.serve.admission import ClientSlots, release_current_permit
from twotower.serve.problems import Problem
from twotower.serve.replies import ItemsReply
from twotower.serve.service import Service, request_weight
from twotower.store.store import Store

SHOWN_EVENTS = 100
"""Latest events shown of a history."""
SHOWN_EXCLUDED = 10
"""Excluded items shown with an answer, best first."""
MAX_CONSOLE_REQUESTS, MAX_CONSOLE_REQUESTS_PER_CLIENT = 16, 8
"""Requests of consoles under way at once: of all clients, and of one. Opening the page sends five."""
MAP_GROUPS = 20
"""Groups of items on the map that have a name; other items have group -1."""
REMOTE_MAP_ITEMS = 20_000
"""Number of most popular items whose vectors are fetched from a remote index."""
SAMPLED_VECTORS = 50_000
"""Number of vectors for the principal components."""
JsonObject = Mapping[str, Json]


class Console:
    """The console of one service. Its requests cost more than recommendations, so they have few slots of their own."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._maps: WeakKeyDictionary[Retriever, ItemMap] = WeakKeyDictionary()
        self._slots = ClientSlots(MAX_CONSOLE_REQUESTS, MAX_CONSOLE_REQUESTS_PER_CLIENT, "console requests")

    def slot(self) -> AbstractContextManager[None]:
        """Hold one of the slots, in place of the request's permit. Raises Problem "overload" if all are taken."""
        return self._slots.hold(release_current_permit())

    async def users(self, query: schemas.QueryText = "", limit: schemas.RowLimit = 20) -> JsonObject:
        """Find users by id: those that begin with the text first, then those that contain it."""
        retriever = self._service.bundles.current
        rows, total = await asyncio.to_thread(_matching_ids, retriever.user_ids, query, limit)
        lengths = retriever.dataset.interacted_items.lengths[rows]
        ids = retriever.user_ids.column.gather(rows).to_list()
        users = [{"id": i, "events": n} for i, n in zip(ids, lengths.tolist(), strict=True)]
        return {"users": users, "total": total}  # with those beyond the limit

    async def user(self, user_id: schemas.PathOrQueryId) -> JsonObject:
        """Return a user's features, history and recent events.

        Raises Problem "unknown-user"."""
        retriever = self._service.bundles.current
        state = await self._service.event_store.fetch(self._service.bundles.event_bundles(retriever), user_id)
        known = retriever.has_user(user_id)
        if not known and not state.events:
            raise Problem("unknown-user", f"user '{user_id}' is not among the bundle's users")
        return {
            "id": user_id,
            "features": stored_features(retriever, user_id) if known else {},
            "history": _history(retriever, user_id) if known else [],
            "events": len(stored_items(retriever, user_id)) if known else 0,
            "recent_events": _titled(state.events, retriever),
        }

    async def items(self, query: schemas.QueryText = "", limit: schemas.RowLimit = 20) -> JsonObject:
        """Find items: the one with this id first, then those whose title contains the text."""
        retriever = self._service.bundles.current
        titles = retriever.titles.column
        found = await asyncio.to_thread(_titles_containing, titles, query)
        rows = found.head(limit).to_numpy()
        total = len(found)
        if (row := retriever.item_ids.row(ItemId(query))) is not None:
            total += int(not (found == row).any())
            rows = np.r_[row, rows[rows != row]][:limit]
        ids, names = retriever.item_ids.column.gather(rows).to_list(), titles.gather(rows).to_list()
        return {"items": [{"id": i, "title": t} for i, t in zip(ids, names, strict=True)], "total": total}

    async def item_map(
        self, column: schemas.GroupColumn = "", limit: schemas.PointLimit = 4_000, bundle: schemas.BundleId = ""
    ) -> JsonObject:
        """Project item vectors to their first two principal components."""
        retriever = await self._retriever(bundle)
        return await asyncio.to_thread(self._map, retriever, column, limit)

    async def explain(
        self, body: schemas.RecommendRequest, bundle: schemas.BundleId = ""
    ) -> Mapping[str, Json | ItemsReply]:
        """Return an answer with its history, excluded items, gates, and the user's point on the map."""
        retriever = await self._retriever(bundle)  # loading a bundle holds no permit
        await asyncio.to_thread(self._drawn, retriever)
        async with self._service.admission.permit(release_current_permit(), request_weight(body)):
            return await self._explained(body, retriever)

    async def _explained(self, body: schemas.RecommendRequest, retriever: Retriever) -> Mapping[str, Json | ItemsReply]:
        self._service.check_limits(body)
        resolved = await self._service.resolve(body, retriever)
        answer, _ = await self._service.answer_or_fallback(body, resolved, retriever)
        query = resolved.query
        user_id = query.request.user_id if query.user is not None else None
        history = _history(retriever, user_id) if user_id is not None and query.history is None else []
        history += _titled(query.events, retriever)
        seen = {*(stored_items(retriever, user_id) if user_id is not None else ()), *(e.item for e in query.events)}
        explained = None
        if answer.source not in ("popular", "fallback"):
            explained = explain(retriever, query, resolved.method)
        excluded: Sequence[JsonObject] = []
        if answer.source != "fallback":
            vector = explained.vector if explained else None
            excluded = await self._service.run_search(
                retriever, lambda: _excluded_items(body, query, retriever, answer, vector, seen)
            )
        allowed = retriever.filters.allowed(body.allow, body.where or None)
        seen_rows = [] if retriever.keeps_seen(body.keep_seen) else retriever.item_ids.rows([ItemId(i) for i in seen])
        gates = explained.gates if explained else []
        return {
            "reply": ItemsReply(**vars(answer), recent_events=query.n_recent),
            "history": history[-SHOWN_EVENTS:],
            "filtered": {  # items that each filter excludes or, for `where`, leaves; and the best of those excluded
                "seen": sum(row >= 0 for row in seen_rows),
                "banned": len(set(body.ban)) - len(retriever.unknown_items(body.ban)),
                "where": None if allowed is None else len(allowed),
                "items": excluded,
            },
            "vector_norm": round(float(np.linalg.norm(explained.vector)), 4) if explained else None,
            "point": self._drawn(retriever).point_of_user(explained.vector).tolist() if explained else None,
            "gates": [{"name": g.name, "fields": list(g.fields), "weights": rounded(w).tolist()} for g, w in gates],
        }

    async def bundles(self) -> JsonObject:
        """List the bundles of the store."""
        listed = await self._service.bundles.with_store(Store.bundles)
        return {
            "bundles": [
                {
                    "id": b.id,
                    "created": b.created,
                    "size": b.size,  # in bytes
                    "current": b.current,
                    "recall": b.recall_check.recall if b.recall_check else None,
                    "damaged": b.damaged,  # the reason if it cannot be loaded
                    "context": list(b.context),
                }
                for b in listed
            ]
        }

    async def _retriever(self, bundle: str) -> Retriever:
        bundles = self._service.bundles
        return await bundles.open_other(bundle) if bundle else bundles.current

    def _map(self, retriever: Retriever, column: str, limit: int) -> JsonObject:
        feature, drawn = colour_feature(retriever, column), self._drawn(retriever)
        shown = drawn.of(retriever.popularity.rows[:limit])
        names, groups = colour_groups(retriever, feature, shown)
        return {
            "bundle_id": retriever.bundle.id,
            "columns": list(colour_columns(retriever)),
            "column": feature.source if feature else "",
            "groups": names,
            "points": [(x, y, g) for (x, y), g in zip(drawn.points(shown).tolist(), groups, strict=True)],
            "ids": retriever.item_ids.column.gather(shown).to_list(),
            "titles": retriever.titles.column.gather(shown).to_list(),
        }

    def _drawn(self, retriever: Retriever) -> ItemMap:
        """Return the map of a bundle, which is kept as long as its retriever."""
        if (found := self._maps.get(retriever)) is None:
            found = self._maps[retriever] = ItemMap(retriever)
        return found


def _history(retriever: Retriever, user_id: str) -> list[JsonObject]:
    """Return the latest stored interactions; `liked` is null for one that is neither liked nor disliked."""
    return [entry._asdict() for entry in stored_history(retriever, user_id, SHOWN_EVENTS)]


def _titled(events: Sequence[Event | ReadEvent], retriever: Retriever) -> list[JsonObject]:
    """Return events with the titles of their items; of an unknown item, its id."""
    rows = retriever.item_ids.rows([ItemId(event.item) for event in events])
    return [
        {"id": event.item, "title": retriever.titles[row] if row >= 0 else event.item, "liked": event.liked}
        for row, event in zip(rows, events, strict=True)
    ]


def _excluded_items(
    body: schemas.RecommendRequest,
    query: Query,
    retriever: Retriever,
    answer: Answer,
    vector: Floats | None,
    seen: set[str],
) -> Sequence[JsonObject]:
    """Return the items that rank above the answer's last one but are banned or in the user's history, best first."""
    excluded = set(body.ban) | (set() if retriever.keeps_seen(body.keep_seen) else seen)
    k = min(MAX_K, len(answer.items) + len(excluded))
    if not excluded or not k:
        return []
    ranked = retriever.recommend(
        query, k, answer.method, vector=vector, allow=body.allow, where=body.where or None, keep_seen=True
    ).items
    answered = {i.id for i in answer.items}
    last = max((position for position, i in enumerate(ranked) if i.id in answered), default=len(ranked))
    better = ranked if answer.truncated else ranked[:last]
    return [{"id": i.id, "title": i.title} for i in better if i.id in excluded][:SHOWN_EXCLUDED]


def _titles_containing(titles: pl.Series, query: str) -> pl.Series:
    """Return the rows of the titles that contain the text, ignoring case."""
    return titles.str.to_lowercase().str.contains(query.lower(), literal=True).fill_null(False).arg_true()


def _matching_ids(ids: UserIds, query: str, limit: int) -> tuple[Ints, int]:
    """Return rows of ids that begin with the text, shortest first, then of those that contain it, and their number."""
    if not query:
        return np.arange(min(limit, len(ids))), len(ids)
    found = ids.column.str.contains(query, literal=True).arg_true()
    texts = pl.DataFrame({"row": found, "id": ids.column.gather(found)})
    first = ~pl.col("id").str.starts_with(query)
    best = texts.sort(first, pl.col("id").str.len_chars(), "id").head(limit)
    return best["row"].to_numpy().astype(np.int64), len(found)


class ItemMap:
    """Points of the items of a bundle, and of vectors of its users. 99.5 % of the coordinates are within -1 to 1."""

    def __init__(self, retriever: Retriever) -> None:
        """Project the items; of a remote index only the most popular ones. Raises Unavailable."""
        self._rows = retriever.index.rows
        if retriever.index.remote:
            popular = retriever.popularity.rows
            self._rows = np.sort(popular[np.isin(popular, self._rows)][:REMOTE_MAP_ITEMS])
        self._vectors = retriever.neighbours.unit_vectors(self._rows)
        sample = self._vectors[:: max(1, len(self._vectors) // SAMPLED_VECTORS)]
        self._mean: Floats = sample.mean(axis=0)
        width = len(self._mean)
        _, directions = np.linalg.eigh(np.cov((sample - self._mean).T.astype(np.float64), bias=True).reshape(width, -1))
        self._plane = np.zeros((width, 2), np.float32)
        best = directions[:, ::-1][:, :2].astype(np.float32)
        self._plane[:, : best.shape[1]] = best * np.where(best.sum(axis=0) < 0, -1, 1)  # a fixed sign
        far = float(np.quantile(np.abs((sample - self._mean) @ self._plane), 0.995)) if len(sample) else 0.0
        self._scale = 1 / far if far > 0 else 1.0

    def of(self, rows: Ints) -> Ints:
        """Return those item rows that have a point."""
        return rows[np.isin(rows, self._rows)]

    def points(self, rows: Ints) -> Doubles:
        """Return the points (n, 2) of item rows (n,)."""
        return self._project(self._vectors[np.searchsorted(self._rows, rows)])

    def point_of_user(self, vector: Floats) -> Doubles:
        """Return the point (2,) of the direction of a user vector (1, D)."""
        vector = vector[:, : len(self._mean)]
        point: Doubles = self._project(vector / max(float(np.linalg.norm(vector)), 1e-12))[0]
        return point

    def _project(self, vectors: Floats) -> Doubles:
        return rounded((vectors - self._mean) @ self._plane * self._scale)


def colour_columns(retriever: Retriever) -> dict[str, Feature]:
    """Return the columns of the items that can colour the map, by name."""
    features = [f for f in retriever.schema.side("item") if f.groups]
    return {
        f.source: f for f in features if f.source in retriever.item_columns and f.source != retriever.schema.item_id
    }


def colour_feature(retriever: Retriever, column: str) -> Feature | None:
    """Return the feature of a column, by default of the first one; None if the items have none. Raises Problem."""
    columns = colour_columns(retriever)
    if column and column not in columns:
        raise Problem("invalid", f"items cannot be coloured by '{column}' (allowed: {', '.join(columns) or 'none'})")
    return columns[column] if column else next(iter(columns.values()), None)


def colour_groups(retriever: Retriever, feature: Feature | None, rows: Ints) -> tuple[list[str], list[int]]:
    """Return the names of the largest groups, and the group of each row; several values: the first group."""
    if feature is None:
        return [], [-1] * len(rows)
    series = retriever.dataset.items.frame[feature.source].gather(rows)
    series = feature.values(series)
    if isinstance(series.dtype, pl.List):
        series = series.list.first()
    values = canonical_ids(series).cast(pl.String).fill_null("").alias("value")  # spelled as in `where`
    counts = (
        values.value_counts(sort=True).filter(pl.col("value") != "").sort("count", "value", descending=[True, False])
    )
    names = counts["value"].head(MAP_GROUPS).to_list()
    number = {name: place for place, name in enumerate(names)}
    return names, [number.get(value, -1) for value in values.to_list()]


def rounded(values: Floats | Doubles) -> Doubles:
    """Return numbers with four decimals."""
    return values.astype(np.float64).round(4)
