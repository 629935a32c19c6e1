"""Vectors, answers and rankings of many users at once: pure functions of a bundle and a table or rows of users.

    embed_batch(retriever, users)                 user_id, source, vector: a row for each row of `users`
    recommend_batch(retriever, users, k=100)      user_id, rank, item_id, score, source: a row for each recommended item

A table is a polars frame or any producer of an Arrow stream, such as a table or a record batch of pyarrow. The result
is a polars frame, which is a producer too. Each row of the input is answered as `Retriever.recommend` answers its
request.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypedDict, Unpack, get_args

import numpy as np
import polars as pl

from twotower.arrays.pieces import pieces
from twotower.arrays.ragged import Column, Ragged, run_indices
from twotower.arrays.sets import distinct_keys, pair_keys
from twotower.arrays.types import Bools, Floats, Ints, UserRow
from twotower.data.context import default_context
from twotower.data.pairs import GroupedPairs, Pairs
from twotower.data.reading.readers import TableLike, as_frame
from twotower.data.reading.times import MICROSECONDS
from twotower.data.tables import with_ids
from twotower.errors import ConfigError, DataError, did_you_mean
from twotower.evaluation.own_items import OwnItems
from twotower.index.vector_store import MAX_NORM, norms
from twotower.model.inputs.gather import Feed, feed, stack_feeds
from twotower.progress import JobProgress
from twotower.retrieval.loaded_bundle import LoadedBundle
from twotower.retrieval.query import Query
from twotower.retrieval.request import Method, Request, UnknownId, check_method, checked_k
from twotower.retrieval.request_body import Json, read_events

if TYPE_CHECKING:
    from twotower.retrieval.retriever import Retriever

log = logging.getLogger(__name__)

UnknownUsers = Literal["popular", "drop", "error"]
"""Answer to a user outside the bundle for whom the table has only the id."""
BLOCK_USERS = 16_384
"""Largest number of users searched at a time."""
BLOCK_ITEMS = 2**21
"""Largest number of items in the answers of a block."""
RANKED_USERS = 256
"""Users that `rank_items` searches at a time."""
NO_DETAILS = Request()
USER_ID = "user_id"
"""Column of ids in a table without the schema's column."""
EVENT_COLUMNS = ("history", "events")
"""Columns of lists of item ids, or of {id, liked, event, time}, as in a request."""
SOURCES = pl.Series("source", ["model", "cold_start", "popular"])
"""Sources of answers: to users of the bundle, to unknown users with details, to other unknown users."""
ATTENTION_MAX_CELLS = 2**21
"""Attention weights of a head in a call of the tower, at most: users times squared history length."""
TOWER_MAX_CODES = 2**21
"""Codes of a field in a call of the tower for more than one user, with padding, at most."""


class BatchOptions(TypedDict, total=False):
    """Options of the answers to a table of users."""

    unknown: UnknownUsers
    allow: Sequence[str] | None
    ban: Sequence[str]
    where: Mapping[str, str] | None
    keep_seen: bool | None


@dataclass(frozen=True)
class UserBatch:
    """B users of a table, read as the requests of a service."""

    ids: pl.Series
    """Ids (B,) of the type of the table."""
    rows: Ints
    """User rows (B,), -1 for unknown users."""
    details: Mapping[int, Query]
    """Queries of the users with features, a history, events or a context, by their place in the batch."""

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def is_detailed(self) -> Bools:
        """Mask (B,) of the users in `details`."""
        mask = np.zeros(len(self), np.bool_)
        mask[[*self.details]] = True
        return mask

    def query(self, place: int) -> Query:
        """Return the query of a row with details, or of a known user."""
        return self.details.get(place) or Query(NO_DETAILS, UserRow(int(self.rows[place])))

    @property
    def sources(self) -> pl.Series:
        """Sources (B,) of the answers, as in `Retriever.recommend`."""
        return SOURCES.gather(np.where(self.rows >= 0, 0, np.where(self.is_detailed, 1, 2)))

    @classmethod
    def read(cls, retriever: Retriever, frame: pl.DataFrame, method: Method) -> UserBatch:
        """Read the rows of a table, for method 1 only the ids. A null or NaN is no value. Raises DataError that names
        the user."""
        key, *others = read_columns(retriever, frame.columns, method)
        texts = with_ids(frame.select(key), key, "users")[key].cast(pl.String)
        rows = retriever.user_ids.find(texts)
        details = dict(_details(retriever, texts, frame.select(others))) if others else {}
        return cls(frame[key], rows, details)


def read_columns(retriever: Retriever, names: Sequence[str], method: Method) -> list[str]:
    """Return the columns of a table that are read: the ids, and for method 2 the user features, the context and
    EVENT_COLUMNS. Raises DataError without a column of ids or of a required context."""
    key = retriever.schema.user_id
    found = next((name for name in (retriever.schema.table_id("user"), key, USER_ID) if name in names), None)
    shown = f"{', '.join(names[:12])}{', …' if len(names) > 12 else ''}"
    if found is None:
        raise DataError(
            f"users: no column '{key}'{did_you_mean(key, names)} (found: {shown or 'none'}); the ids of the users "
            f"are in a column '{key}'{'' if key == USER_ID else f' or {USER_ID!r}'}"
        )
    if method == 1:
        return [found]
    for column in retriever.user_inputs.context.required:
        if column not in names:
            raise DataError(
                f"users: no column '{column}'{did_you_mean(column, names)} (found: {shown}); the model reads it as "
                "context: give it, or declare a default for the feature and train again"
            )
    readable = {*retriever.user_columns, *retriever.context_columns, *EVENT_COLUMNS} - {found}
    return [found, *(name for name in names if name in readable)]


def _details(retriever: Retriever, ids: pl.Series, frame: pl.DataFrame) -> Iterator[tuple[int, Query]]:
    """Yield place and query of each row with a value besides its id."""
    for name in EVENT_COLUMNS:
        if name in frame.columns and not isinstance(frame.schema[name], pl.List | pl.Array | pl.Null):
            raise DataError(f"users: column '{name}' holds {frame.schema[name]}, expected lists of item ids")
    frame = frame.with_columns(with_seconds(frame[name]) for name in EVENT_COLUMNS if name in frame.columns)
    for place, values in enumerate(frame.iter_rows(named=True)):
        given: dict[str, Json] = {name: value for name, value in values.items() if not _is_missing(value)}
        if not given:
            continue
        context = {name: given[name] for name in retriever.context_columns if name in given}
        features = {name: given[name] for name in retriever.user_columns if name in given}
        with naming_user(ids[place]):
            lists = {name: read_events(name, given[name]) for name in EVENT_COLUMNS if name in given}
            query = retriever.query(Request(ids[place], features, context=context, **lists))
            if query.has_details:
                yield place, query


def with_seconds(events: pl.Series) -> pl.Series:
    """Return lists of events with dates and datetimes as seconds since 1970."""
    lists = events.arr.to_list() if isinstance(events.dtype, pl.Array) else events
    event = lists.dtype.inner if isinstance(lists.dtype, pl.List) else None
    if not isinstance(event, pl.Struct) or event.to_schema().get("time") not in (pl.Date, pl.Datetime):
        return events
    return lists.list.eval(pl.element().struct.with_fields(pl.field("time").dt.epoch("us") / MICROSECONDS))


def _is_missing(value: Json) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


@contextmanager
def naming_user(user_id: str) -> Iterator[None]:
    """Name the user in a DataError of the block."""
    try:
        yield
    except DataError as e:
        raise DataError(f"user '{user_id}': {e}") from None


@dataclass(frozen=True)
class BatchAnswer:
    """Answers to the users of a block."""

    frame: pl.DataFrame
    """Columns user_id, rank (from 1), item_id, score, source; users in the order of the block."""
    sources: Counter[str]
    """Number of answered users by source."""
    unknown: int
    """Number of unknown users without an answer."""
    empty: int
    """Number of answered users without an item."""


class BatchRecommender:
    """Answers the users of tables with the same options."""

    def __init__(
        self, retriever: Retriever, k: int, method: Method = 1, *, unknown: UnknownUsers = "popular",
        allow: Sequence[str] | None = None, ban: Sequence[str] = (), where: Mapping[str, str] | None = None,
        keep_seen: bool | None = None,
    ) -> None:  # fmt: skip
        """Take the options of `recommend_batch`. Raises DataError, ConfigError."""
        check_method(method)
        _check_stored(retriever, method)
        if unknown not in get_args(UnknownUsers):
            raise ConfigError(f"`unknown` is {unknown!r}, expected {', '.join(get_args(UnknownUsers))}")
        self.k = checked_k(k)
        self._retriever, self._method, self._unknown = retriever, method, unknown
        self.keep_seen = retriever.keeps_seen(keep_seen)
        self._banned, self._allowed = retriever.filters.banned(ban), retriever.filters.allowed(allow, where)
        self._popular = retriever.popularity.top(self.k, self._banned, self._allowed)[0]

    def answers(self, frame: pl.DataFrame) -> Iterator[BatchAnswer]:
        """Yield the answers to the users of a frame, at least one block. Raises DataError, Unavailable."""
        step = max(1, min(BLOCK_USERS, BLOCK_ITEMS // self.k))
        for start in range(0, max(1, len(frame)), step):
            yield self._answer(UserBatch.read(self._retriever, frame.slice(start, step), self._method))

    def _answer(self, users: UserBatch) -> BatchAnswer:
        sources = users.sources
        popular = (users.rows < 0) & ~users.is_detailed
        if self._unknown == "error" and popular.any():
            known = len(self._retriever.user_ids)
            raise UnknownId(
                f"user '{users.ids[int(np.argmax(popular))]}' is not among the {known:,} users of this bundle; set "
                "`unknown` to 'popular' or 'drop' to answer with popular items or leave unknown users out"
            )
        rows = np.full((len(users), self.k), -1, np.int64)
        scores = np.zeros((len(users), self.k), np.float32)
        places = np.flatnonzero(~popular)
        vectors = _embed(self._retriever, users, places, self._method)
        filters = self._retriever.filters
        excluded = [filters.excluded(self._banned, users.query(p), self.keep_seen) for p in places.tolist()]
        rows[places], scores[places] = self._retriever.catalogue.rank_many(
            vectors, self.k, excluded, self._allowed, self._own(users, places)
        )
        if self._unknown == "popular":
            rows[np.flatnonzero(popular)[:, None], np.arange(len(self._popular))] = self._popular
        answered = np.ones(len(users), np.bool_) if self._unknown == "popular" else ~popular
        counts = (rows >= 0).sum(axis=1)
        return BatchAnswer(
            answer_frame(
                users.ids, rows, scores, counts, sources, [self._retriever.dataset.items.ids.rename("item_id")]
            ),
            Counter(dict(sources.filter(pl.Series(answered)).value_counts().iter_rows())),
            int((~answered).sum()),
            int((answered & (counts == 0)).sum()),
        )

    def _own(self, users: UserBatch, places: Ints) -> list[OwnItems] | None:
        """Return what the histories of some users add to the scores of their items. None: the model
        has no such term."""
        if (own := self._retriever.history_scores) is None:
            return None
        detailed = users.is_detailed[places]
        plain = iter(own.of_users(users.rows[places[~detailed]]))
        return [
            next(plain)
            if place not in users.details  # type: ignore[misc]
            else self._retriever.own_items(users.details[place], self._method)
            for place in places.tolist()
        ]


def answer_frame(
    ids: pl.Series, rows: Ints, scores: Floats, counts: Ints, sources: pl.Series, items: Sequence[pl.Series]
) -> pl.DataFrame:
    """Return the answers to B users, a row for each user and rank: `user_id`, `rank` from 1, the columns of the
    `items`, `score` and `source`. An answer is the first `counts` (B,) of its `rows` and `scores` (B, k)."""
    found: Bools = np.arange(rows.shape[1]) < counts[:, None]
    owners = np.repeat(np.arange(len(ids)), counts)
    ranks = run_indices(np.ones(len(ids), np.int64), counts)
    return pl.DataFrame(
        [
            ids.gather(owners).rename("user_id"),
            pl.Series("rank", ranks.astype(np.int32)),
            *(column.gather(rows[found]) for column in items),
            pl.Series("score", scores[found]),
            sources.gather(owners),
        ]
    )


def recommend_batch(
    retriever: Retriever, users: TableLike, k: int = 100, method: Method = 1, **options: Unpack[BatchOptions]
) -> pl.DataFrame:
    """Return the `k` items with the highest scores for each user of a table, as `retriever.recommend` returns them.

    The result has a row for each user and item: `user_id` of the type of the table, `rank` from 1 (Int32), `item_id` of
    the type of the bundle, `score` (Float32; 0 for popular items) and `source`. A user has fewer than `k` rows if fewer
    items remain after the filters. Users are in the order of the table; a repeated user is answered again.

    Ids are in the column that the schema names, or in `user_id`. Method 1 (precomputed user vectors) reads only the
    ids. Method 2 (online user tower) also reads columns of features, which replace stored ones, and `history` and
    `events`, lists of item ids or of {id, liked, event, time}; a null is no value. Other columns are ignored. `unknown`
    is the answer to a user who is not in the bundle and has no other values: "popular" items, "drop" leaves the user
    out, "error" raises UnknownId. The filters are the same as in `Retriever.recommend`. Raises DataError, ConfigError,
    Unavailable.
    """
    recommender = BatchRecommender(retriever, k, method, **options)
    return pl.concat([answer.frame for answer in recommender.answers(as_frame(users, "users"))])


def embed_batch(retriever: Retriever, users: TableLike, method: Method = 1) -> pl.DataFrame:
    """Return the vector that `recommend_batch` searches with for each row of a table: `user_id`, `source`, and
    `vector`, an array of float32, null for the source "popular". Raises DataError."""
    check_method(method)
    _check_stored(retriever, method)
    frame = as_frame(users, "users")
    width, parts = retriever.index.width, []
    for start in range(0, max(1, len(frame)), BLOCK_USERS):
        batch = UserBatch.read(retriever, frame.slice(start, BLOCK_USERS), method)
        places = np.flatnonzero((batch.rows >= 0) | batch.is_detailed)
        vectors = np.zeros((len(batch), width), np.float32)
        vectors[places] = _embed(retriever, batch, places, method)
        known = pl.Series(np.isin(np.arange(len(batch)), places))
        parts.append(
            pl.DataFrame(
                [batch.ids.rename("user_id"), batch.sources, pl.Series("vector", vectors, pl.Array(pl.Float32, width))]
            ).with_columns(pl.when(known).then(pl.col("vector")))
        )
    return pl.concat(parts)


def _check_stored(retriever: Retriever, method: Method) -> None:
    """Raise DataError for method 1 without precomputed vectors."""
    if method == 1 and retriever.loaded.user_vectors is None:
        raise retriever.loaded.no_vectors()


def _embed(retriever: Retriever, users: UserBatch, places: Ints, method: Method) -> Floats:
    """Return the vectors (n, D) of some users of a batch. Raises DataError that names the user."""
    rows = users.rows[places]
    if method == 1:
        return embed_users(retriever, rows, 1)
    vectors = np.empty((len(places), retriever.index.width), np.float32)
    detailed = (
        users.is_detailed[places] | retriever.reads_context
    )  # a context has defaults and the time of each request
    vectors[~detailed] = embed_users(retriever, rows[~detailed], 2)
    feeds = []
    for place in places[detailed].tolist():
        with naming_user(str(users.ids[place])):
            feeds.append(retriever.user_inputs.read(users.query(place)).feed)
    vectors[detailed] = embed_feeds(retriever.loaded, feeds)
    usable = norms(vectors) < MAX_NORM
    if not usable.all():
        place = int(places[np.argmin(usable)])
        raise DataError(
            f"user '{users.ids[place]}': the user tower's vector is not finite; use smaller numbers in the features"
        )
    return vectors


def embed_users(retriever: Retriever, users: Ints, method: Method, interactions: Ints | None = None) -> Floats:
    """Return the vectors (B, D) of user rows (B,): precomputed (method 1), or by the tower on stored features (method
    2), in calls of bounded memory.

    A tower that reads a context gets the context of the interactions (B,), by default the declared default. Raises
    DataError without precomputed vectors, ConfigError without a default context."""
    loaded = retriever.loaded
    if method == 1:
        return loaded.stored_vectors(users)
    if not len(users):
        return np.empty((0, loaded.index.width), np.float32)
    data, context, moments = loaded.dataset, dict[str, Column](), np.zeros(len(users), np.int64)
    if interactions is not None:
        context, moments = data.context, interactions
    elif retriever.reads_context:
        context = default_context(data.encoders, data.context_frame)

    def part(rows: slice) -> Feed:
        return feed(loaded.fields, loaded.columns, users[rows], context, moments[rows])

    histories = [c for c in loaded.columns.values() if isinstance(c, Ragged)]
    return _vectors(
        loaded, part, len(users), max((int(c.indices(users)[1].max(initial=0)) for c in histories), default=0)
    )


def embed_feeds(loaded: LoadedBundle, feeds: Sequence[Feed]) -> Floats:
    """Return the vectors (B, D) of the feeds of B users, in calls of bounded memory."""
    if not feeds:
        return np.empty((0, loaded.index.width), np.float32)
    longest = max((part.shape[1] for one in feeds for part in one.values() if part.ndim == 2), default=0)
    return _vectors(loaded, lambda rows: stack_feeds(feeds[rows]), len(feeds), longest)


def _vectors(loaded: LoadedBundle, part: Callable[[slice], Feed], n: int, longest: int) -> Floats:
    """Return the vectors (n, D) of n users, whose rows of codes have at most `longest` codes, by the feeds of slices of
    them."""
    step = max(1, TOWER_MAX_CODES // max(256, longest))
    if limit := max((f.limit for f in loaded.fields), default=0):
        step = min(step, max(1, ATTENTION_MAX_CELLS // limit**2))
    return np.concatenate([loaded.tower(part(slice(start, start + step))) for start in range(0, n, step)])


def rank_items(
    retriever: Retriever, users: Ints, k: int, method: Method, seen: Sequence[GroupedPairs], exact: bool = False,
    only_seen: bool = False, interactions: Ints | None = None,
) -> Ints:  # fmt: skip
    """Return the top `k` item rows (B, k) for user rows (B,), padded with -1: without the items in `seen`, or, if
    `only_seen`, among them.

    `interactions` (B,) have the context of each user, for a tower that reads one."""
    best, rank, no_rows = np.full((len(users), k), -1, np.int64), retriever.catalogue.rank, np.zeros(0, np.int64)
    progress = JobProgress(log, "users ranked", len(users), seconds=60.0)
    for part in pieces(len(users), RANKED_USERS):
        vectors = embed_users(retriever, users[part], method, None if interactions is None else interactions[part])
        items = _distinct_items(seen, users[part], len(retriever.item_ids))
        own = retriever.history_scores.of_users(users[part]) if retriever.history_scores else None
        if only_seen:
            for n, (vector, allowed) in enumerate(zip(vectors, items, strict=True)):
                best[part.start + n] = rank(vector[None], k, no_rows, allowed, own[n] if own else None, exact)[0]
        elif own:
            best[part] = retriever.catalogue.rank_many(vectors, k, items, None, own, exact)[0]
        else:
            best[part] = retriever.index.search(vectors, k, banned=items, exact=exact)[0]
        progress.advance(len(vectors))
    return best


def _distinct_items(seen: Sequence[GroupedPairs], users: Ints, n_items: int) -> list[Ints]:
    """Return the distinct item rows of each user's pairs, ascending."""
    if not seen:
        return [np.zeros(0, np.int64)] * len(users)
    taken = Pairs.concatenated([pairs.take(users) for pairs in seen])
    cells = distinct_keys(pair_keys(taken.user, taken.item, n_items))
    ends = np.searchsorted(cells, np.arange(1, len(users)) * n_items)
    return np.split(cells % n_items, ends)
