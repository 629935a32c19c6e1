"""Shape of a log, and the rules by which it decides the recipe, each with its number and threshold."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl

from twotower.arrays.types import Ints
from twotower.data.evidence import (
    MIN_LIFT,
    MIN_Z,
    DriftEvidence,
    OrderEvidence,
    begin_apart,
    drift_evidence,
    order_evidence,
)
from twotower.data.labels import POSITIVE
from twotower.data.reading.times import TIME
from twotower.data.tables import Tables
from twotower.features.schema import Schema
from twotower.features.side import SIDES, SideName
from twotower.progress import doing
from twotower.scorers.start import common_items
from twotower.suggestion.features import SideFeature, SideFeatures, is_text

MIN_NEW = 0.2  # share of new items from which a model must know items by their contents
MIN_NEW_USERS = 0.5  # share of new users from which the latest rows are of users without a history
MAX_FEW = 10  # median rows of a user up to which columns of users may say more than a history without an order
MIN_TOP = 2  # least label from which two labels are the top of a scale, such as ratings of 4 and 5
MIN_LAST = 3  # rows of a user from which a last one, the one before it and one to learn exist
LAST_SHARE = 0.1  # share of the interactions, the latest, whose items and users are counted as new or known
TYPICAL_ROWS = 10  # multiple of the median rows for which a user counts at most in the share of repeated rows
MAX_BUCKETS = 16  # distinct values of a number that a recipe keeps
MAX_QUERY_LENGTH = 5  # median rows of a user up to which a text of users is a query
MIN_NEGATIVES = 0.05  # share of negatives from which a label of two values is worth a ranking of its own
MIN_LONG = 50  # median rows of a user from which a history is long
MIN_SHARED, MIN_TIMES, SAMPLED_PAIRS = 0.2, 2.0, 20_000
"""Share of rows whose query and title share a word, multiple of that of shuffled rows, and rows compared."""
MIN_USER_LIFT, MIN_USER_Z, ROWS_OF_VALUE, MAX_USER_ROWS = 1.4, 5.0, 20, 200_000
"""Lift, and deviations above shuffled users, from which a column of users predicts items; rows of each value, on
average; rows that are compared."""

_WORDS = r"\p{Han}|[\p{L}\p{N}--\p{Han}]+"


@dataclass(frozen=True)
class Shape:
    """Numbers of tables that a training would read."""

    users: int  # users with an interaction
    items: int  # items of the catalogue, with an interaction or without
    common: int  # the least number of items that have most of the taken rows
    interactions: int
    taken: int  # rows of what users took: the positives, or all rows if the label is a scale
    length: float  # median number of taken rows of a user that has any
    long_length: float  # number of taken rows that a tenth of the users exceeds
    measurable: int  # users of MIN_LAST taken rows or more
    order: OrderEvidence | None  # None: the log has no time
    drift: DriftEvidence | None  # None: the log has no times that all users share
    label_values: int  # distinct labels; 0: no label
    is_scale: bool  # three labels or more, or two from MIN_TOP on
    negatives: float  # share of the rows that are negatives, by label or event
    new_items: float  # share of the latest rows whose item is new; without shared times, of rows whose item has one
    new_users: float  # share of the latest rows whose user is new; 0 without times that all users share
    by_time: bool  # True if `new_items` is of the latest rows
    query: str  # column of text of the users that shares most words with `words`; empty: none
    words: str  # column of text of the items; empty: none
    shared: tuple[float, float]  # share of rows whose `query` and `words` share a word, and with shuffled items
    content_kinds: int  # combinations of values of the items' columns without text and many names, at most
    contents: int  # features of the items without their ids
    texts: int  # those of them that are text
    telling: Mapping[str, float]  # columns of users that predict items, with the lift of a shared value
    values: Mapping[str, int]  # values of each of the items' columns without text

    @property
    def has_telling(self) -> bool:
        """True if a column of the users predicts much."""
        return max(self.telling.values(), default=0.0) >= MIN_USER_LIFT

    @property
    def has_order(self) -> bool:
        """True if rows follow one another."""
        return self.order is not None and self.order.exists


@doing("measuring the shape of the log")
def measure_shape(tables: Tables, schema: Schema, sides: Mapping[SideName, SideFeatures], shared_time: bool) -> Shape:
    """Return the shape of checked tables with the features of their sides.

    `shared_time` is False if times order the items of one user alone."""
    actions = tables.interactions
    users = actions[schema.user_id].rank("dense").to_numpy().astype(np.int64) - 1
    items = np.unique(actions[schema.item_id].to_numpy(), return_inverse=True)[1].astype(np.int64)
    positive = actions[POSITIVE].to_numpy().astype(bool)
    labels = actions[schema.label] if schema.label else pl.Series([], dtype=pl.Float64)
    least, n_items = float(labels.min() or 0), int(items.max(initial=0)) + 1  # type: ignore[arg-type]
    is_scale = (labels.n_unique() > 2 or least >= MIN_TOP) and least >= 0
    taken = positive | is_scale
    lengths = np.bincount(users[taken])
    lengths = lengths[lengths > 0] if taken.any() else np.zeros(1, np.int64)
    times = actions[TIME].to_numpy() if TIME in actions.columns else None
    of_all = times is not None and (schema.time_unit != "order" or begin_apart(users[taken], times[taken]))
    by_time = times is not None and shared_time and bool(times.min() < times.max())
    frames: dict[SideName, pl.DataFrame] = {"user": tables.users, "item": tables.items}
    own = {side: sides[side].features for side in SIDES}
    texts = {side: [f.column for f in own[side] if f.is_text and is_text(frames[side][f.column])] for side in SIDES}
    if not texts["user"] and is_text(actions[schema.user_id]):
        texts["user"] = [schema.user_id]
    query, words, shared = _searched(tables, schema, texts["user"], texts["item"])
    coded = {side: [f for f in own[side] if not f.is_text] for side in SIDES}
    single = float((np.bincount(items) == 1).sum()) / max(1, len(items))
    return Shape(
        users=int(users.max(initial=-1)) + 1,
        items=tables.items.height,
        common=common_items(np.bincount(np.unique(users[taken] * n_items + items[taken]) % n_items)),
        interactions=actions.height,
        taken=int(taken.sum()),
        length=float(np.median(lengths)),
        long_length=float(np.quantile(lengths, 0.9)),
        measurable=int((lengths >= MIN_LAST).sum()),
        order=None if times is None else order_evidence(users[taken], items[taken], times[taken]),
        drift=drift_evidence(users[taken], items[taken], times[taken])
        if times is not None and by_time and of_all
        else None,
        label_values=labels.n_unique(),
        is_scale=is_scale,
        negatives=float(1 - positive.mean()),
        new_items=_new_share(items, times) if times is not None and by_time else single,
        new_users=_new_share(users, times) if times is not None and by_time else 0.0,
        by_time=by_time,
        query=query,
        words=words,
        shared=shared,
        content_kinds=math.prod(_kinds(tables.items[f.column], f) for f in coded["item"]),
        contents=len(own["item"]),
        texts=sum(f.is_text for f in own["item"]),
        telling=_telling(tables, schema, coded["user"], users[taken], items[taken]),
        values={f.column: _values(frames["item"][f.column], f) for f in coded["item"]},
    )


def _kinds(values: pl.Series, feature: SideFeature) -> int:
    """Return the number of distinct values of a feature."""
    distinct = max(1, values.n_unique())
    return min(distinct, MAX_BUCKETS) if "buckets" in feature.options else distinct


def _values(series: pl.Series, feature: SideFeature) -> int:
    """Return the number of values that a feature has, of lists those in them."""
    if separator := feature.options.get("separator"):
        series = series.str.split(str(separator))
    return _kinds(series.explode() if series.dtype.is_nested() else series, feature)


def _searched(
    tables: Tables, schema: Schema, queries: Sequence[str], titles: Sequence[str]
) -> tuple[str, str, tuple[float, float]]:
    """Return the two of some text columns of users and items that share words most often, and the shares of rows."""
    rows = np.random.default_rng(0).permutation(tables.interactions.height)[:SAMPLED_PAIRS]
    ids = tables.interactions.select(schema.user_id, schema.item_id)[rows]

    def words(side: pl.DataFrame, key: str, column: str) -> pl.Series:
        last = side.select(key, column).unique(key, keep="last") if column != key else ids.select(key).unique()
        found = ids.join(last, on=key, how="left", maintain_order="left")[column]
        return found.fill_null("").str.to_lowercase().str.extract_all(_WORDS)

    def share(one: pl.Series, other: pl.Series) -> float:
        common = pl.DataFrame({"one": one, "other": other}).select(pl.col("one").list.set_intersection("other"))
        return float((common["one"].list.len() > 0).mean() or 0)  # type: ignore[arg-type]

    best, gap = (next(iter(queries), ""), next(iter(titles), ""), (0.0, 0.0)), -math.inf
    for query in queries if titles else ():
        of_query = words(tables.users, schema.user_id, query)
        for title in titles:
            of_title = words(tables.items, schema.item_id, title)
            found, chance = share(of_query, of_title), share(of_query, of_title.shuffle(1))
            if found - chance > gap:
                best, gap = (query, title, (found, chance)), found - chance
    return best


def _telling(
    tables: Tables, schema: Schema, features: Sequence[SideFeature], users: Ints, items: Ints
) -> dict[str, float]:
    """Return the columns of users that predict items beyond chance: how often two users of one value take one item, in
    multiples of any two. `users` and `items` are codes of rows, of which one for each user is compared."""
    ids = tables.interactions.select(pl.col(schema.user_id).unique().sort())
    last = tables.users.unique(schema.user_id, keep="last")
    frame = ids.join(last, on=schema.user_id, how="left", maintain_order="left")
    rng, n_items = np.random.default_rng(0), int(items.max(initial=0)) + 1
    pairs = rng.permutation(np.unique(users * n_items + items))
    users, items = np.divmod(pairs[np.unique(pairs // n_items, return_index=True)[1]][:MAX_USER_ROWS], n_items)

    def agreement(codes: Ints) -> float:
        joint, alone = (np.unique(c, return_counts=True)[1].astype(float) for c in (codes * n_items + items, codes))
        return float((joint * (joint - 1)).sum() / max(1.0, (alone * (alone - 1)).sum()))

    lifts = dict[str, float]()
    for feature in features:
        values = frame[feature.column]
        if "separator" in feature.options or values.dtype.is_nested():
            continue
        values = values.fill_nan(None) if values.dtype.is_float() else values
        if buckets := int(str(feature.options.get("buckets", 0))):
            values = (values.rank("average") * buckets / (len(values) - values.null_count() + 1)).floor()
        codes = values.rank("dense").fill_null(0).to_numpy().astype(np.int64)[users]
        if len(np.unique(codes)) * ROWS_OF_VALUE <= len(codes):
            chance = [agreement(rng.permutation(codes)) for _ in range(16)]
            mean, deviation, found = float(np.mean(chance)), float(np.std(chance)), agreement(codes)
            lifts |= {feature.column: found / mean} if deviation and found - mean >= MIN_USER_Z * deviation else {}
    return lifts


def _new_share(ids: Ints, times: Ints) -> float:
    """Return the share of the latest tenth of the rows whose item, or user, has no row before that tenth begins."""
    late = times >= np.quantile(times, 1 - LAST_SHARE, method="higher")
    known = np.unique(ids[~late])
    return float((~np.isin(ids[late], known)).mean()) if len(known) else 0.0


def parts_follow(actions: pl.DataFrame, user_id: str, part: str) -> bool:
    """Return True if no row of a user is later than one of a later part."""
    if TIME not in actions.columns:
        return False
    ends = actions.group_by(user_id, part).agg(first=pl.col(TIME).min(), last=pl.col(TIME).max()).sort(user_id, part)
    after = ends.with_columns(before=pl.col("last").cum_max().shift().over(user_id)).drop_nulls("before")
    return bool(len(after)) and bool((after["first"] >= after["before"]).all())


def repeated_share(actions: pl.DataFrame, user_id: str, item_id: str) -> float:
    """Return the share of the rows that repeat an earlier pair of user and item.

    A user counts for at most TYPICAL_ROWS times the median number of rows of users with several."""
    users = actions.group_by(user_id).agg(rows=pl.len(), items=pl.col(item_id).n_unique())
    if not len(users):
        return 0.0
    rows, items = users["rows"].to_numpy(), users["items"].to_numpy()
    several = rows[rows > 1]
    weight = np.minimum(1.0, TYPICAL_ROWS * np.median(several if len(several) else rows) / rows)
    return float(weight @ (rows - items) / (weight @ rows))


@dataclass(frozen=True)
class Condition:
    """Number of a log, and the thresholds between which it fits a recipe."""

    what: str
    value: float
    least: float = -math.inf
    most: float = math.inf

    @property
    def holds(self) -> bool:
        """True if the number fits."""
        return self.least <= self.value <= self.most

    def __str__(self) -> str:
        bounds = {"at least": self.least, "at most": self.most}
        shown = " and ".join(f"{word} {bound:g}" for word, bound in bounds.items() if math.isfinite(bound))
        return f"{self.what} {self.value:.3g} ({shown})"


Conditions = Sequence[Condition]


@dataclass(frozen=True)
class RecipeRule:
    """Recipe, the conditions of a shape that it is right for, and what a shape needs for it."""

    recipe: str
    question: str
    rows: int  # rows of the log on which the recipe's settings were chosen
    cases: Callable[[Shape], Sequence[Conditions]]  # of one case all must hold, and no earlier rule fit
    lacks: Callable[[Shape], str]  # column that the recipe needs and the tables lack; empty: none
    min_steps: int = 0  # least steps of a training, measured on small logs; 0: a tenth of the recipe's own
    ids: int = 0  # users and items of the log on which the settings of a recipe without epochs were chosen
    needs_contents: bool = False  # items are ranked by their contents alone
    reads_users: bool = False  # columns of users that predict items are added to the history

    def fits(self, shape: Shape) -> bool:
        """Return True if all conditions of a case hold."""
        return any(map(hold, self.cases(shape)))

    def reason(self, shape: Shape) -> str:
        """Return the numbers that decide, with their thresholds."""
        return "; or ".join(", ".join(map(str, case)) for case in self.cases(shape)) or "no other recipe fits"


def hold(conditions: Conditions) -> bool:
    """Return True if all of some conditions hold."""
    return all(condition.holds for condition in conditions)


def new_items(shape: Shape) -> Conditions:
    """Return whether many items are new, and columns describe them: texts, where no times or order show new items."""
    is_shown = shape.by_time or shape.has_order or (shape.texts > 0 and shape.content_kinds < shape.items)
    rows = "latest rows of items without an earlier row" if shape.by_time else "rows of items without another row"
    return [
        Condition(f"share of the {rows}", shape.new_items, MIN_NEW), Condition("columns of items", shape.contents, 1),
        Condition("times, an order or texts that show new items", is_shown, 1),
    ]  # fmt: skip


def telling_users(shape: Shape) -> Conditions:
    """Return whether columns of users say more than their histories, which are short and in no order."""
    best = max(shape.telling.values(), default=0.0)
    return [
        Condition("lift of the columns of users that predict items", best, MIN_USER_LIFT),
        Condition(_LENGTH, shape.length, most=MAX_FEW), Condition("an order", shape.has_order, most=0),
    ]  # fmt: skip


def _queries(shape: Shape) -> Conditions:
    found, chance = shape.shared
    columns = f" of '{shape.query}' and '{shape.words}'" if shape.query and shape.words else ""
    return [
        Condition(f"share of the rows with a common word{columns}", found, MIN_SHARED),
        Condition("multiple of shuffled items", min(99.0, found / max(chance, 1e-9)), MIN_TIMES),
        Condition(_LENGTH, shape.length, most=MAX_QUERY_LENGTH),
    ]  # fmt: skip


def _refusals(shape: Shape) -> Conditions:
    share = Condition("share of negatives", shape.negatives, MIN_NEGATIVES, 1 - MIN_NEGATIVES)
    scale = Condition(f"a scale of {shape.label_values} labels, which rate what users chose,", shape.is_scale, most=0)
    return [share, scale] if shape.is_scale else [share]


def _order(shape: Shape) -> list[Condition]:
    found = shape.order
    lift, z = (found.lift, found.z) if found else (0.0, 0.0)
    return [Condition("lift of the order", lift, MIN_LIFT), Condition("its z", z, MIN_Z)]


def _lacks_time(shape: Shape) -> str:
    return "" if shape.order is not None else "a time: set schema.time"


_LENGTH = "median rows of a user"

RULES = (
    RecipeRule(
        "words", "which item do these words mean?", 36_451, lambda s: [_queries(s)],
        lambda s: "" if s.query and s.words else f"a text column of the {'items' if s.query else 'users'}",
    ),
    RecipeRule(
        "ranking", "would the user like an item that is shown?", 1_000_209, lambda s: [_refusals(s)],
        lambda s: "" if s.negatives else "negatives: set schema.label and schema.positive_above",
    ),
    RecipeRule(
        "cold-start", "what does a user take next, if items or users are new and columns describe them?", 575_281,
        lambda s: [new_items(s), telling_users(s)],
        lambda s: "" if s.contents or s.telling else "columns of items, or columns of users that predict items",
        needs_contents=True, reads_users=True,
    ),
    RecipeRule(
        "sequence-long", "what does a user take next?", 1_000_209,
        lambda s: [[*_order(s), Condition(_LENGTH, s.length, MIN_LONG)]], _lacks_time,
    ),
    RecipeRule(
        "sequence-short", "what does a user take next?", 198_502, lambda s: [_order(s)], _lacks_time,
        min_steps=1000, reads_users=True,
    ),
    RecipeRule(
        "collaborative", "what else does a user take, in any order?", 575_281, lambda s: [[]], lambda s: "",
        ids=6038 + 3533,
    ),
)  # fmt: skip
"""Rules of the recipes; the first that fits is chosen."""


def choose(shape: Shape) -> RecipeRule:
    """Return the first rule that fits a shape."""
    return next(rule for rule in RULES if rule.fits(shape))
