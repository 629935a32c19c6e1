"""Users of a table, read as the requests that a service gets: an id, and for method 2 what a row says of its user."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from twotower.arrays.types import Bools, Ints
from twotower.data.tables import with_ids
from twotower.data.times import MICROSECONDS
from twotower.errors import DataError, did_you_mean
from twotower.retrieval.request import Json, Method, Request, RequestRows

if TYPE_CHECKING:
    from twotower.retrieval.retriever import Retriever

USER_ID = "user_id"
"""Column of ids, where a table has no column of the schema's name."""
EVENT_COLUMNS = ("history", "events")
"""Columns of lists of item ids, or of {id, liked, event, time}, as a request has them."""

SOURCES = pl.Series("source", ["model", "cold_start", "popular"])
"""Sources of answers: to users of the bundle, to others of whom something is given, and to the rest."""


@dataclass(frozen=True)
class UserBatch:
    """B users of a table."""

    ids: pl.Series
    """Ids (B,) as the table has them."""
    rows: Ints
    """User rows (B,) of the bundle, -1 for unknown users."""
    details: Mapping[int, tuple[Request, RequestRows]]
    """Requests of the users of whom the table gives features, a history, events or a context, by their place in the batch."""

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def is_detailed(self) -> Bools:
        """Mask (B,) of the users in `details`."""
        mask = np.zeros(len(self), np.bool_)
        mask[[*self.details]] = True
        return mask

    def request(self, place: int, retriever: Retriever) -> tuple[Request, RequestRows]:
        """Return the request that a row stands for."""
        if place in self.details:
            return self.details[place]
        request = Request(str(self.ids[place]))
        return request, retriever.rows_of(request)

    @property
    def sources(self) -> pl.Series:
        """Sources (B,) of the answers, as `Retriever.recommend` has them."""
        return SOURCES.gather(np.where(self.rows >= 0, 0, np.where(self.is_detailed, 1, 2)))

    @classmethod
    def read(cls, retriever: Retriever, frame: pl.DataFrame, method: Method) -> UserBatch:
        """Read the rows of a table. Method 1 reads the ids alone; method 2 reads `read_columns`, where a null, or a NaN, gives
        nothing. Raises DataError that names the row."""
        key, *others = read_columns(retriever, frame.columns, method)
        texts = with_ids(frame.select(key), key, "users")[key].cast(pl.String)
        rows = retriever.user_ids.find(texts)
        details = dict(_details(retriever, texts, frame.select(others))) if others else {}
        return cls(frame[key], rows, details)


def read_columns(retriever: Retriever, names: Sequence[str], method: Method) -> list[str]:
    """Return those columns of a table that are read: the ids, and for method 2 the features of the users, the context and
    EVENT_COLUMNS.
    Raises DataError without a column of ids."""
    key = retriever.schema.user_id
    found = next((name for name in (retriever.schema.table_id("user"), key, USER_ID) if name in names), None)
    if found is None:
        shown = f"{', '.join(names[:12])}{', …' if len(names) > 12 else ''}"
        raise DataError(
            f"users: no column '{key}'{did_you_mean(key, names)} (found: {shown or 'none'}); the ids of the users are in a "
            f"column '{key}'{'' if key == USER_ID else f' or {USER_ID!r}'}"
        )
    if method == 2:
        _need_context(retriever, names)
    readable = {*retriever.user_columns, *retriever.context_columns, *EVENT_COLUMNS} - {found}
    return [found, *(name for name in names if name in readable)] if method == 2 else [found]


def _need_context(retriever: Retriever, names: Sequence[str]) -> None:
    """Raise DataError if a table lacks a column of the context that has no default."""
    for column in retriever.user_inputs.context.required:
        if column not in names:
            raise DataError(
                f"users: no column '{column}'{did_you_mean(column, names)} (found: {', '.join(names[:12])}); the model reads it as "
                "context: give it, or declare a default for the feature and train again"
            )


def _details(
    retriever: Retriever, ids: pl.Series, frame: pl.DataFrame
) -> Iterator[tuple[int, tuple[Request, RequestRows]]]:
    """Yield place and request of each row that gives anything beyond its id."""
    for name in EVENT_COLUMNS:
        if name in frame.columns and not isinstance(frame.schema[name], pl.List | pl.Array | pl.Null):
            raise DataError(f"users: column '{name}' holds {frame.schema[name]}, expected lists of item ids")
    frame = frame.with_columns(with_seconds(frame[name]) for name in EVENT_COLUMNS if name in frame.columns)
    for place, values in enumerate(frame.iter_rows(named=True)):
        given: dict[str, Json] = {name: value for name, value in values.items() if not _is_missing(value)}
        if not given:
            continue
        body: dict[str, Json] = {name: given[name] for name in EVENT_COLUMNS if name in given}
        body["context"] = {name: given[name] for name in retriever.context_columns if name in given}
        body["features"] = {name: given[name] for name in retriever.user_columns if name in given}
        with naming_user(ids[place]):
            request = retriever.heard(Request.parse({"user_id": ids[place]} | body))
            if request.has_details:
                yield place, (request, retriever.rows_of(request))


def with_seconds(events: pl.Series) -> pl.Series:
    """Return lists of events with times in seconds since 1970, where they are dates or datetimes."""
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
