"""Vectors and answers of many users at once: pure functions from an Arrow table to a frame, for a job or any other engine.

    embed_batch(retriever, users)                 user_id, source, vector: a row for each row of `users`
    recommend_batch(retriever, users, k=100)      user_id, rank, item_id, score, source: a row for each recommended item

A table is a polars frame or any producer of an Arrow stream: a table or a record batch of pyarrow, for example. The result is a
polars frame, which is such a producer too. Each row of the input is answered as `Retriever.recommend` answers its request.
"""

from __future__ import annotations

from collections import Counter, abc
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import polars as pl

from twotower.arrays.ragged import run_indices
from twotower.arrays.types import Bools, Floats, Ints
from twotower.data.own_items import OwnItems
from twotower.data.readers import TableLike, as_frame
from twotower.errors import ConfigError, DataError
from twotower.index.vector_store import MAX_NORM, norms
from twotower.retrieval.request import Method, UnknownId, check_method, checked_k
from twotower.retrieval.user_batch import UserBatch, naming_user
from twotower.retrieval.user_vectors import embed_feeds, embed_users, embed_users_in_blocks

if TYPE_CHECKING:
    from twotower.retrieval.retriever import Retriever

UnknownUsers = Literal["popular", "drop", "error"]
"""Answer to a user who is not in the bundle and of whom the table gives nothing but the id."""
BLOCK_USERS = 16_384
"""Greatest number of users that are searched at a time."""
BLOCK_ITEMS = 2**21
"""Greatest number of items of the answers of a block."""


@dataclass(frozen=True)
class BatchAnswer:
    """Answers to the users of a block."""

    frame: pl.DataFrame
    """Columns user_id, rank (from 1), item_id, score, source; users in the order of the block."""
    sources: Counter[str]
    """Number of answered users by the source of their answer."""
    unknown: int
    """Number of unknown users that are left out."""
    empty: int
    """Number of answered users for whom no item remains."""


class BatchRecommender:
    """Answers users of tables, all with the same options."""

    def __init__(
        self,
        retriever: Retriever,
        k: int,
        method: Method = 1,
        *,
        unknown: UnknownUsers = "popular",
        allow: abc.Sequence[str] | None = None,
        ban: abc.Sequence[str] = (),
        where: Mapping[str, str] | None = None,
        keep_seen: bool | None = None,
    ) -> None:
        """Take the options of `recommend_batch`. Raises DataError, ConfigError."""
        check_method(method)
        _check_stored(retriever, method)
        if unknown not in get_args(UnknownUsers):
            raise ConfigError(f"`unknown` is {unknown!r}, expected {', '.join(get_args(UnknownUsers))}")
        self.k = checked_k(k)
        self._retriever, self._method, self._unknown = retriever, method, unknown
        self.keep_seen = retriever.keeps_seen(keep_seen)
        self._ban = ban
        self._allowed = retriever.filters.allowed(allow, where)
        banned = retriever.filters.excluded_of_users(ban, np.zeros(1, np.int64), keep_seen=True)[0]
        self._popular = retriever.popularity.top(self.k, banned, self._allowed)[0]

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
        excluded, own = self._excluded(users, places), self._own(users, places)
        ranked = self._retriever.catalogue.rank_many(vectors, self.k, excluded, self._allowed, own)
        rows[places], scores[places] = ranked
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

    def _excluded(self, users: UserBatch, places: Ints) -> list[Ints]:
        """Return the item rows that the answer to each of some users leaves out."""
        filters = self._retriever.filters
        detailed = users.is_detailed[places]
        plain = iter(filters.excluded_of_users(self._ban, users.rows[places[~detailed]], self.keep_seen))
        return [
            filters.excluded(self._ban, users.details[place][1], self.keep_seen) if given else next(plain)
            for place, given in zip(places.tolist(), detailed.tolist(), strict=True)
        ]

    def _own(self, users: UserBatch, places: Ints) -> list[OwnItems] | None:
        """Return what the history of each of some users adds to the scores of its items; None of a model without own counts."""
        if (own := self._retriever.own_counts) is None:
            return None
        detailed = users.is_detailed[places]
        plain = iter(own.of_users(users.rows[places[~detailed]]))
        return [
            self._retriever.own_items(*users.details[place], self._method) if given else next(plain)  # type: ignore[misc]
            for place, given in zip(places.tolist(), detailed.tolist(), strict=True)
        ]


def answer_frame(
    ids: pl.Series, rows: Ints, scores: Floats, counts: Ints, sources: pl.Series, items: abc.Sequence[pl.Series]
) -> pl.DataFrame:
    """Return the answers to B users as one row for each user and rank: `user_id`, `rank` from 1, the columns of the
    `items`, `score` and `source`. An answer is the `rows` and `scores` (B, k) up to its count (B,)."""
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
    retriever: Retriever,
    users: TableLike,
    k: int = 100,
    method: Method = 1,
    *,
    unknown: UnknownUsers = "popular",
    allow: abc.Sequence[str] | None = None,
    ban: abc.Sequence[str] = (),
    where: Mapping[str, str] | None = None,
    keep_seen: bool | None = None,
) -> pl.DataFrame:
    """Return the `k` items with the highest scores for each user of a table, as `retriever.recommend` finds them.

    The result has a row for each user and item: `user_id` of the type that the table has, `rank` from 1 (Int32), `item_id` of the
    type that the bundle has, `score` (Float32; 0 for popular items) and `source`. A user for whom no item remains has no row, and
    one with fewer than `k` rows has all that remain. Users are in the order of the table; a repeated user is answered again.

    Ids are in the column that the schema names, or in `user_id`. Method 1 (precomputed user vectors) reads the ids alone. Method 2
    (online user tower) also reads columns of features, which replace stored ones, and `history` and `events`, lists of item ids or
    of {id, liked, event, time}; a null gives nothing. Other columns are ignored. `unknown` is the answer to a user who is not in the bundle and
    of whom the table gives nothing else: "popular" items, "drop" leaves the user out, "error" raises UnknownId. Filters are those
    of `Retriever.recommend`. Raises DataError, ConfigError, Unavailable.
    """
    asked = BatchRecommender(
        retriever, k, method, unknown=unknown, allow=allow, ban=ban, where=where, keep_seen=keep_seen
    )
    return pl.concat([answer.frame for answer in asked.answers(as_frame(users, "users"))])


def embed_batch(retriever: Retriever, users: TableLike, method: Method = 1) -> pl.DataFrame:
    """Return the vector that `recommend_batch` searches with for each row of a table: `user_id`, `source`, and `vector`, an array
    of float32, null for the source "popular". Raises DataError."""
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
                [
                    batch.ids.rename("user_id"),
                    batch.sources,
                    pl.Series("vector", vectors, pl.Array(pl.Float32, width)),
                ]
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
    detailed = users.is_detailed[places] | retriever.reads_context  # a context has defaults and times of each request
    vectors[~detailed] = embed_users_in_blocks(retriever, rows[~detailed])
    feeds = []
    for place in places[detailed].tolist():
        request, found = users.request(place, retriever)
        with naming_user(str(request.user_id)):
            feeds.append(retriever.user_inputs.read(request, found).feed)
    vectors[detailed] = embed_feeds(retriever.loaded, feeds)
    usable = norms(vectors) < MAX_NORM
    if not usable.all():
        place = int(places[np.argmin(usable)])
        raise DataError(
            f"user '{users.ids[place]}': the user tower's vector is not finite; use smaller numbers in the features"
        )
    return vectors
