"""Data of the console at /: users, items, bundles, explained answers, and the map of item vectors."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import AbstractContextManager
from weakref import WeakKeyDictionary

import numpy as np
import polars as pl

from twotower.arrays.types import Floats, Ints, ItemId
from twotower.data.ids import UserIds
from twotower.retrieval.event import Event
from twotower.retrieval.request import MAX_K, Answer, Request
from twotower.retrieval.retriever import Retriever, explain, stored_features, stored_history, stored_items
from twotower.serve import schemas
from twotower.serve.admission import release_current_permit
from twotower.serve.client_limits import ClientSlots
from twotower.serve.console_replies import (
    BundlesReply,
    ExplainedReply,
    FilteredReply,
    FoundItems,
    FoundUser,
    FoundUsers,
    GateReply,
    MapReply,
    StoredBundle,
    TitledEvent,
    TitledItem,
    UserReply,
)
from twotower.serve.item_map import ItemMap, colour_columns, colour_feature, colour_groups, rounded
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


class Console:
    """The console of one service. Its requests cost more than recommendations, so they have few slots of their own."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._maps: WeakKeyDictionary[Retriever, ItemMap] = WeakKeyDictionary()
        self._slots = ClientSlots(MAX_CONSOLE_REQUESTS, MAX_CONSOLE_REQUESTS_PER_CLIENT, "console requests")

    def slot(self) -> AbstractContextManager[None]:
        """Hold one of the slots, in place of the request's permit. Raises Problem "overload" if all are taken."""
        return self._slots.hold(release_current_permit())

    async def users(self, query: str, limit: int) -> FoundUsers:
        """Find users: the one with this id, those whose id begins with the text, then those whose id contains it."""
        retriever = self._service.bundles.current
        rows, total = await asyncio.to_thread(_matching_ids, retriever.user_ids, query, limit)
        lengths = retriever.dataset.interacted_items.lengths[rows]
        ids = retriever.user_ids.column.gather(rows).to_list()
        return FoundUsers([FoundUser(i, n) for i, n in zip(ids, lengths.tolist(), strict=True)], total)

    async def user(self, user_id: str) -> UserReply:
        """Return a user's stored features, history and recent events. Raises Problem "unknown-user"."""
        retriever = self._service.bundles.current
        state = await self._service.event_store.fetch(self._service.bundles.event_bundles(retriever), user_id)
        if not retriever.has_user(user_id):
            if not state.events:
                raise Problem("unknown-user", f"user '{user_id}' is not among the bundle's users")
            return UserReply(user_id, {}, [], 0, _titled(state.events, retriever))
        return UserReply(
            user_id,
            stored_features(retriever, user_id),
            [TitledEvent(*entry) for entry in stored_history(retriever, user_id, SHOWN_EVENTS)],
            len(stored_items(retriever, user_id)),
            _titled(state.events, retriever),
        )

    async def items(self, query: str, limit: int) -> FoundItems:
        """Find items: the one with this id, then those whose title contains the text."""
        retriever = self._service.bundles.current
        titles = retriever.titles.column
        found = await asyncio.to_thread(_titles_containing, titles, query)
        rows = found.head(limit).to_numpy()
        total = len(found)
        if (row := retriever.item_ids.row(ItemId(query))) is not None:
            total += int(not (found == row).any())
            rows = np.r_[row, rows[rows != row]][:limit]
        ids, names = retriever.item_ids.column.gather(rows).to_list(), titles.gather(rows).to_list()
        return FoundItems([TitledItem(i, t) for i, t in zip(ids, names, strict=True)], total)

    async def map(self, column: str, limit: int, bundle: str) -> MapReply:
        """Project the most popular items to the first two principal components of all item vectors."""
        retriever = await self._retriever(bundle)
        return await asyncio.to_thread(self._map, retriever, column, limit)

    async def explain(self, body: schemas.RecommendRequest, bundle: str) -> ExplainedReply:
        """Return an answer with its history, excluded items, gates, and the user's point on the map."""
        retriever = await self._retriever(bundle)  # loading a bundle holds no permit
        await asyncio.to_thread(self._drawn, retriever)
        async with self._service.admission.permit(release_current_permit(), request_weight(body)):
            return await self._explained(body, retriever)

    async def _explained(self, body: schemas.RecommendRequest, retriever: Retriever) -> ExplainedReply:
        self._service.limits.check(body)
        recommender = self._service.recommender
        resolved = await recommender.resolve(body, retriever)
        answer, _ = await recommender.answer_or_fallback(body, resolved, retriever)
        request = resolved.request
        events = retriever.user_inputs.event_types.read(request.all_events)
        user_id = request.user_id if resolved.known_user else None
        history: list[TitledEvent] = []
        if user_id is not None and request.history is None:
            history = [TitledEvent(*entry) for entry in stored_history(retriever, user_id, SHOWN_EVENTS)]
        history += _titled(events, retriever)
        seen = set(stored_items(retriever, user_id) if user_id is not None else ()) | {
            event.item for event in request.all_events
        }
        explained = None
        if answer.source not in ("popular", "fallback"):
            explained = explain(retriever, request, resolved.method)
        excluded: list[TitledItem] = []
        if answer.source != "fallback":
            vector = explained.vector if explained else None
            excluded = await recommender.run_search(
                retriever, lambda: _excluded_items(body, request, retriever, answer, vector, seen)
            )
        allowed = retriever.filters.allowed(body.allow, body.where or None)
        filtered = FilteredReply(
            seen=0
            if retriever.keeps_seen(body.keep_seen)
            else sum(row >= 0 for row in retriever.item_ids.rows([ItemId(i) for i in seen])),
            banned=len(set(body.ban)) - len(retriever.unknown_items(body.ban)),
            where=None if allowed is None else len(allowed),
            items=excluded,
        )
        reply = ExplainedReply(ItemsReply.of(answer, len(request.recent)), history[-SHOWN_EVENTS:], filtered)
        if explained is not None:
            reply.vector_norm = round(float(np.linalg.norm(explained.vector)), 4)
            reply.point = self._drawn(retriever).point_of_user(explained.vector).tolist()
            reply.gates = [GateReply(g.name, list(g.fields), rounded(w).tolist()) for g, w in explained.gates]
        return reply

    async def bundles(self) -> BundlesReply:
        """List the bundles of the store."""
        listed = await self._service.bundles.with_store(Store.bundles)
        return BundlesReply(
            [
                StoredBundle(
                    b.id,
                    b.created,
                    b.size,
                    b.current,
                    b.recall_check.recall if b.recall_check else None,
                    b.damaged,
                    list(b.context),
                )
                for b in listed
            ]
        )

    async def _retriever(self, bundle: str) -> Retriever:
        bundles = self._service.bundles
        return await bundles.open_other(bundle) if bundle else bundles.current

    def _map(self, retriever: Retriever, column: str, limit: int) -> MapReply:
        feature, drawn = colour_feature(retriever, column), self._drawn(retriever)
        shown = drawn.of(retriever.popularity.rows[:limit])
        names, groups = colour_groups(retriever, feature, shown)
        return MapReply(
            bundle_id=retriever.bundle.id,
            columns=list(colour_columns(retriever)),
            column=feature.source if feature else "",
            groups=names,
            points=[(x, y, g) for (x, y), g in zip(drawn.points(shown).tolist(), groups, strict=True)],
            ids=retriever.item_ids.column.gather(shown).to_list(),
            titles=retriever.titles.column.gather(shown).to_list(),
        )

    def _drawn(self, retriever: Retriever) -> ItemMap:
        """Return the map of a bundle, which is kept as long as its retriever."""
        if (found := self._maps.get(retriever)) is None:
            found = self._maps[retriever] = ItemMap(retriever)
        return found


def _titled(events: Sequence[Event], retriever: Retriever) -> list[TitledEvent]:
    """Return events with the titles of their items; of an unknown item, its id."""
    rows = retriever.item_ids.rows([ItemId(event.item) for event in events])
    return [
        TitledEvent(event.item, retriever.titles[row] if row >= 0 else event.item, event.liked)
        for row, event in zip(rows, events, strict=True)
    ]


def _excluded_items(
    body: schemas.RecommendRequest,
    request: Request,
    retriever: Retriever,
    answer: Answer,
    vector: Floats | None,
    seen: set[str],
) -> list[TitledItem]:
    """Return the items that rank above the answer's last one but are banned or in the user's history, best first."""
    excluded = set(body.ban) | (set() if retriever.keeps_seen(body.keep_seen) else seen)
    k = min(MAX_K, len(answer.items) + len(excluded))
    if not excluded or not k:
        return []
    ranked = retriever.recommend(
        request, k, answer.method, vector=vector, allow=body.allow, where=body.where or None, keep_seen=True
    ).items
    answered = {i.id for i in answer.items}
    last = max((position for position, i in enumerate(ranked) if i.id in answered), default=len(ranked))
    better = ranked if answer.truncated else ranked[:last]
    return [TitledItem(i.id, i.title) for i in better if i.id in excluded][:SHOWN_EXCLUDED]


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
