"""Shape of checked tables: the numbers by which a recipe is chosen and set."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import polars as pl

from twotower.arrays.types import Ints
from twotower.data.drift_evidence import DriftEvidence, begin_apart, drift_evidence
from twotower.data.labels import POSITIVE
from twotower.data.order_evidence import OrderEvidence, order_evidence
from twotower.data.parts import PART
from twotower.data.tables import Tables
from twotower.data.times import TIME
from twotower.features.schema import Schema
from twotower.features.side import SIDES, SideName
from twotower.progress import doing
from twotower.suggestion.id_parts import IdParts, id_parts
from twotower.suggestion.names import names_undoing
from twotower.suggestion.query_evidence import QueryEvidence, query_evidence
from twotower.suggestion.side_features import SideFeature, SideFeatures, is_text
from twotower.suggestion.thresholds import no_rating
from twotower.suggestion.user_evidence import UserEvidence, column_codes, user_evidence
from twotower.train.starts.start import common_items

DENSE = 0.5
"""Share of all pairs of user and item from which the presence of a row says nothing."""
MIN_NEW = 0.2
"""Share of new items from which a model must know items by their contents."""
MIN_NEW_USERS = 0.5
"""Share of new users from which the latest rows are of users without a history, as in a log of sessions."""
MAX_FEW = 10
"""Median rows of a user up to which columns of users may tell more than a history without an order."""
MIN_TOP = 2
"""Least label from which two labels are the top of a scale, such as ratings of 4 and 5, and not refusals and likes."""
MIN_LAST = 3
"""Rows of a user from which a last one, the one before it and one to learn are there."""
LAST_SHARE = 0.1
"""Share of the interactions, the latest, whose items and users are counted as new or known."""
TYPICAL_ROWS = 10
"""Times the median number of rows for which a user counts at most in the share of repeated rows."""

MAX_BUCKETS = 16
"""Values of a number that a recipe tells apart."""


@dataclass(frozen=True)
class Shape:
    """Numbers of tables that a training would read."""

    users: int
    """Users with an interaction."""
    items: int
    """Items of the catalogue, with an interaction or without."""
    unused: int
    """Items of the catalogue without an interaction."""
    common: int
    """The least number of items that have most of the taken rows."""
    interactions: int
    taken: int
    """Rows of what users took: the positives, or all rows if the label is a scale, on which users rate what they took."""
    length: float
    """Median number of taken rows of a user that has any."""
    long_length: float
    """Number of taken rows that a tenth of the users exceeds."""
    measurable: int
    """Users of MIN_LAST taken rows or more."""
    order: OrderEvidence | None
    """None: the log has no time."""
    drift: DriftEvidence | None
    """Evidence that what is popular changes. None: the log has no times that all users share."""
    label_values: int
    """Distinct labels. 0: no label."""
    is_scale: bool
    """True for three labels or more, none below 0 but one for no rating, or two from MIN_TOP on, in a log that is not dense: users rate
    what they took."""
    no_rating: float | None
    """Label that stands for no rating; None without."""
    negatives: float
    """Share of the rows that are negatives, by label or event."""
    undone: float
    """Share of the rows that are negatives as they take an earlier choice back, such as a refund."""
    new_items: float
    """Share of the latest tenth of the rows whose item has no earlier row, or, of a log without times that all users share, of all rows
    whose item has no other: by Good and Turing that of the next rows whose item has none."""
    new_users: float
    """Share of the latest tenth of the rows whose user has no earlier row. 0 of a log without times that all users share."""
    by_time: bool
    """True if `new_items` is of the latest rows, False if it is of all."""
    query: str
    """Column of the users that holds text, that which shares most words with `words`. Empty: none."""
    words: str
    """Column of the items that holds text. Empty: none."""
    queries: QueryEvidence | None
    """Evidence that users search for items. None: users or items have no text."""
    content_kinds: int
    """Combinations of values that the items' columns without text and many names can have at most, numbers in MAX_BUCKETS buckets.
    1: no column."""
    content_values: int
    """Values of the items' columns without text, those of all columns together, numbers in MAX_BUCKETS buckets."""
    joint_values: int
    """Sum over each column of the users without text, and each of the items or their id, of the smaller number of values."""
    contents: int
    """Features of the items beside their ids."""
    texts: int
    """Those of them that are text."""
    telling: UserEvidence
    """Evidence that columns of the users tell what they take."""
    users_change: bool
    """True if a row of the users holds from a time on, so that they have several values of a column."""
    density: float
    """Share of the pairs of a user and an item, both with a row, that have one."""
    is_dense: bool
    """True if users have rows for most items, two or more of each user and item on average, so that the presence of a row says nothing."""
    values: Mapping[tuple[SideName, str], int] = field(default_factory=dict)
    """Values of each column without text, by side and column, numbers in MAX_BUCKETS buckets."""
    id_parts: IdParts = field(default_factory=IdParts)
    """Parts of the items' ids that tell what users take."""

    @property
    def rows_of_user(self) -> str:
        """Rows of a user, the median, in words."""
        return f"{self.length:g} row{'' if self.length == 1 else 's'}"

    @property
    def has_telling_users(self) -> bool:
        """True if columns of users tell more than their histories, which are short and in no order."""
        has_order = self.order is not None and self.order.exists
        return self.telling.exists and self.length <= MAX_FEW and not has_order

    @property
    def has_new_items(self) -> bool:
        """True if many items are new, and columns say what they are. Without times and without an order columns of values rank new items
        beside closed forms too, and texts do not, which are read where other columns are the same for several items."""
        has_order = self.order is not None and self.order.exists
        reads_text = self.texts > 0 and self.content_kinds < self.items
        return self.contents > 0 and self.new_items >= MIN_NEW and (self.by_time or has_order or reads_text)


@doing("measuring the shape of the log")
def measure_shape(
    tables: Tables,
    schema: Schema,
    sides: Mapping[SideName, SideFeatures],
    shared_time: bool = True,
    may_be_unrated: bool = True,
) -> Shape:
    """Return the shape of checked tables with the features of their sides by "user" and "item". `shared_time` is False if times
    order the items of one user alone, `may_be_unrated` if no label stands for no rating, whatever their rows."""
    actions = tables.interactions
    users = actions[schema.user_id].rank("dense").to_numpy().astype(np.int64) - 1
    ids, codes = np.unique(actions[schema.item_id].to_numpy(), return_inverse=True)
    items = codes.astype(np.int64)
    positive = actions[POSITIVE].to_numpy().astype(bool)
    label_values = actions[schema.label].n_unique() if schema.label else 0
    n_users, n_items = int(users.max(initial=0)) + 1, int(items.max(initial=0)) + 1
    pairs = len(np.unique(users * n_items + items))
    density = pairs / (n_users * n_items)
    is_dense = density >= DENSE and pairs >= 2 * max(n_users, n_items)
    least = float(actions[schema.label].min()) if schema.label else 0.0  # type: ignore[arg-type]
    unrated = no_rating(actions[schema.label]) if schema.label and may_be_unrated else None
    is_scale = (label_values > 2 or least >= MIN_TOP) and (least >= 0 or unrated is not None) and not is_dense
    taken = positive | is_scale
    lengths = np.bincount(users[taken])
    lengths = lengths[lengths > 0]
    times = actions[TIME].to_numpy() if TIME in actions.columns else None
    order = order_evidence(users[taken], items[taken], times[taken]) if times is not None else None
    orders_all = times is not None and (schema.time_unit != "order" or begin_apart(users[taken], times[taken]))
    by_time = times is not None and shared_time and bool(times.min() < times.max())
    queries = [f.column for f in sides["user"].features if f.is_text and is_text(tables.users[f.column])]
    if not queries and is_text(actions[schema.user_id]):
        queries = [schema.user_id]
    titles = [f.column for f in sides["item"].features if f.is_text and is_text(tables.items[f.column])]
    frames: dict[SideName, pl.DataFrame] = {"user": tables.users, "item": tables.items}
    values: dict[tuple[SideName, str], int] = {
        (side, f.column): _values(frames[side][f.column], f)
        for side in SIDES
        for f in sides[side].features
        if not f.is_text
    }
    query, words, evidence = _searched(tables, schema, queries, titles)
    return Shape(
        users=int(users.max(initial=-1)) + 1,
        items=tables.items.height,
        unused=tables.items.height - n_items,
        common=common_items(np.bincount(np.unique(users[taken] * n_items + items[taken]) % n_items)),
        interactions=actions.height,
        taken=int(taken.sum()),
        length=float(np.median(lengths)) if len(lengths) else 0.0,
        long_length=float(np.quantile(lengths, 0.9)) if len(lengths) else 0.0,
        measurable=int((lengths >= MIN_LAST).sum()),
        order=order,
        drift=drift_evidence(users[taken], items[taken], times[taken])
        if times is not None and by_time and orders_all
        else None,
        label_values=label_values,
        is_scale=is_scale,
        no_rating=unrated,
        negatives=float(1 - positive.mean()),
        undone=_undone(actions[schema.event].filter(~actions[POSITIVE].cast(pl.Boolean))) / actions.height
        if schema.event
        else 0.0,
        new_items=_new_share(items, times) if times is not None and by_time else _single_share(items),
        new_users=_new_share(users, times) if times is not None and by_time else 0.0,
        by_time=by_time,
        query=query,
        words=words,
        queries=evidence,
        content_kinds=math.prod(
            _kinds(tables.items[f.column], f) for f in sides["item"].features if not (f.is_text or f.is_name)
        ),
        content_values=sum(n for (side, _), n in values.items() if side == "item"),
        joint_values=_joint_values(values, n_items),
        contents=len(sides["item"].features),
        texts=sum(f.is_text for f in sides["item"].features),
        telling=_telling(tables, schema, sides["user"].features, users[taken], items[taken]),
        users_change="user" in tables.versions,
        density=density,
        is_dense=is_dense,
        values=values,
        id_parts=id_parts(users[taken], items[taken], pl.Series(ids.tolist())),
    )


def _undone(events: pl.Series) -> int:
    """Return the number of events that take an earlier choice back, by their names."""
    undoings = [kind for kind in events.unique().cast(pl.String).to_list() if kind and names_undoing(kind)]
    return int(events.cast(pl.String).is_in(undoings).sum())


def _telling(tables: Tables, schema: Schema, features: Sequence[SideFeature], users: Ints, items: Ints) -> UserEvidence:
    """Return the evidence of the users' columns of one value a user, of rows of the codes of users, ascending by their ids, and items."""
    ids = tables.interactions.select(pl.col(schema.user_id).unique().sort())
    found = ids.join(
        tables.users.unique(schema.user_id, keep="last"), on=schema.user_id, how="left", maintain_order="left"
    )
    single = [f for f in features if not (f.is_text or "separator" in f.options or found[f.column].dtype.is_nested())]
    codes = [column_codes(found[f.column], int(str(f.options.get("buckets", 0)))) for f in single]
    return user_evidence(users, items, [(f.column, c) for f, c in zip(single, codes, strict=True)])


def _kinds(values: pl.Series, feature: SideFeature) -> int:
    """Return the number of values that a feature tells apart."""
    distinct = max(1, values.n_unique())
    return min(distinct, MAX_BUCKETS) if "buckets" in feature.options else distinct


def _values(series: pl.Series, feature: SideFeature) -> int:
    """Return the number of values that a feature has, of lists those in them."""
    if separator := feature.options.get("separator"):
        series = series.str.split(str(separator))
    return _kinds(series.explode() if series.dtype.is_nested() else series, feature)


def _joint_values(values: Mapping[tuple[SideName, str], int], n_items: int) -> int:
    """Return the sum of the smaller numbers of values, of each column of the users and each of the items or their id."""
    of = {side: [n for (where, _), n in values.items() if where == side] for side in SIDES}
    return sum(min(one, other) for one in of["user"] for other in (*of["item"], n_items))


def _searched(
    tables: Tables, schema: Schema, queries: Sequence[str], titles: Sequence[str]
) -> tuple[str, str, QueryEvidence | None]:
    """Return the two of some text columns of users and items that share words most often, and the evidence of these."""
    if not (queries and titles):
        return next(iter(queries), ""), next(iter(titles), ""), None
    ids = tables.interactions.select(schema.user_id, schema.item_id)
    asked = {name: _of_rows(ids, tables.users, schema.user_id, name) for name in queries}
    found = {name: _of_rows(ids, tables.items, schema.item_id, name) for name in titles}
    pairs = [(one, other, query_evidence(asked[one], found[other])) for one in queries for other in titles]
    return max(pairs, key=lambda pair: (pair[2].exists, pair[2].shared - pair[2].shuffled))


def _of_rows(ids: pl.DataFrame, side: pl.DataFrame, key: str, column: str) -> pl.Series:
    """Return the values of a column of users or items for each row of a log, of the last row of each id."""
    if column == key:
        return ids[key]
    return ids.join(side.select(key, column).unique(key, keep="last"), on=key, how="left", maintain_order="left")[
        column
    ]


def _new_share(ids: Ints, times: Ints) -> float:
    """Return the share of the latest tenth of the rows (n,) whose item, or user, has no row before that tenth begins."""
    start = np.quantile(times, 1 - LAST_SHARE, method="higher")
    late = times >= start
    known = np.unique(ids[~late])
    return float((~np.isin(ids[late], known)).mean()) if len(known) else 0.0


def _single_share(ids: Ints) -> float:
    """Return the share of rows (n,) whose item has no other row."""
    return float((np.bincount(ids) == 1).sum()) / max(1, len(ids))


def parts_follow(actions: pl.DataFrame, schema: Schema) -> bool:
    """Return True if no row of a user is later than one of a later part."""
    if TIME not in actions.columns:
        return False
    ends = actions.group_by(schema.user_id, PART).agg(first=pl.col(TIME).min(), last=pl.col(TIME).max())
    ends = ends.sort(schema.user_id, PART)
    after = ends.with_columns(before=pl.col("last").cum_max().shift().over(schema.user_id)).drop_nulls("before")
    return bool(len(after)) and bool((after["first"] >= after["before"]).all())


def repeated_share(actions: pl.DataFrame, user_id: str, item_id: str) -> float:
    """Return the share of the rows that repeat an earlier pair of user and item, in which a user counts for at most TYPICAL_ROWS times the
    median number of rows of users with several: a few accounts that repeat one item tell nothing of the others."""
    users = actions.group_by(user_id).agg(rows=pl.len(), items=pl.col(item_id).n_unique())
    if not len(users):
        return 0.0
    rows, items = users["rows"].to_numpy(), users["items"].to_numpy()
    several = rows[rows > 1]
    weight = np.minimum(1.0, TYPICAL_ROWS * np.median(several if len(several) else rows) / rows)
    return float(weight @ (rows - items) / (weight @ rows))
