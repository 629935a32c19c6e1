"""Columns that hold the answers: the items that a user takes, or the users who take an item, as the table has that a log is made from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import polars as pl
from pydantic import ValidationError

from twotower.arrays.types import Ints
from twotower.config.toml import TomlValue
from twotower.features.schema import EventRule
from twotower.features.side import SIDES, SideName
from twotower.features.values import canonical_ids, explode, lists
from twotower.suggestion import names
from twotower.suggestion.side_features import SideFeature, SideFeatures, is_text

MIN_HELD = 0.5
"""Share of the rows whose answer a column holds, above which it is left out; and of those whose answer it would not hold by chance."""
MIN_Z = 5.0
"""Standard deviations that the share is above that of shuffled rows, at least: small whole numbers of both sides meet by chance."""
MIN_ROWS = 20
"""Rows of users or items with a value, from which the share tells anything."""
MAX_ROWS = 100_000
"""Rows that are looked at; of more, some drawn at random."""
MAX_VALUES = 1_000_000
"""Values in lists that are looked at; of more, those of some users or items."""
SHUFFLES = 5
MIN_SEVERAL = 1.1
"""Values of each text, on average, from which text is a list in which ids are looked for."""
MIN_IDS = 0.5
"""Share of them that are ids of the other side, from which they are a list of these, and no words."""
MIN_COUNTED = 0.9
"""Rank correlation of a column of numbers and the rows that took an item, or of a user, their number or share, from which it may be counted from these
rows."""
KINDS = ("categorical", "multi_hot", "numeric")
"""Kinds of features whose values may be ids, beside lists in text."""
SEPARATORS = ("|", ";", ",", "\t", " ")
"""Separators of ids in text that is no list of few values."""

_AROUND = " []()'\""
"""Characters around a value, as a program writes lists in text: ['a', 'b']."""
_OWN, _OTHER = "own", "other"
_TAKEN, _ALL, _SHARE = "__taken", "__all", "__share"


def taken_rows(interactions: pl.DataFrame, options: Mapping[str, TomlValue]) -> pl.DataFrame:
    """Return the interactions that are positives by the options of a schema, as far as a label of numbers or the types of events tell."""
    label, event = str(options.get("label") or ""), str(options.get("event") or "")
    above, events = options.get("positive_above", 0), options.get("events")
    if label in interactions.columns and isinstance(above, int | float):
        dtype = interactions[label].dtype
        if dtype.is_numeric() or dtype == pl.Boolean:
            return interactions.filter(pl.col(label).cast(pl.Float64) > float(above))
    if event in interactions.columns and isinstance(events, Mapping):
        try:
            rules = {kind: EventRule.model_validate(rule) for kind, rule in events.items()}
        except ValidationError:  # told where the config is read
            return interactions
        positive = {kind: rule.target == "positive" and rule.weight > 0 for kind, rule in rules.items()}
        kinds = interactions[event].cast(pl.String).unique().drop_nulls().to_list()
        taken = [kind for kind in kinds if positive.get(kind, positive.get("*", False))]
        return interactions.filter(pl.col(event).cast(pl.String).is_in(taken))
    return interactions


def without_answers(
    found: SideFeatures, frame: pl.DataFrame, side: SideName, ids: Mapping[SideName, str], rows: pl.DataFrame
) -> SideFeatures:
    """Return the features of a side without those of columns that hold the answers of `rows`, the interactions that were taken, each with a
    note. `frame` is the side's table, and `ids` has the columns of ids by side."""
    other = next(name for name in SIDES if name != side)
    shares = dict[str, float]()
    if len(rows) and not any(
        dtype.is_nested() for dtype in (rows[ids[side]].dtype, rows[ids[other]].dtype, frame[ids[side]].dtype)
    ):
        known = _text(rows[ids[other]].unique())
        rows = rows.sample(min(len(rows), MAX_ROWS), seed=0)
        pairs = pl.DataFrame({_OWN: _text(rows[ids[side]]), _OTHER: _text(rows[ids[other]])}).drop_nulls()
        own = _text(frame[ids[side]])
        shares = {f.column: _held(f, frame[f.column], own, pairs, known) for f in found.features}
    left = [f for f in found.features if shares.get(f.column)]
    if not left:
        return found
    notes = [
        f"'{f.column}' of the {side}s, it holds the {other} of {shares[f.column]:.0%} of the rows with a value of it: the answers (add a feature of it if it was known before the rows)"
        for f in left
    ]
    features = tuple(f for f in found.features if f not in left)
    title = found.title
    if title in [f.column for f in left]:
        title = next((f.column for f in features if f.is_text and is_text(frame[f.column])), "")
    return replace(found, features=features, title=title, notes=(*found.notes, *notes))


def counted_columns(
    found: SideFeatures, frame: pl.DataFrame, key: str, taken: pl.DataFrame, rows: pl.DataFrame
) -> dict[str, float]:
    """Return the columns of numbers of a side's table that follow the number of the `taken` rows of its ids, of all `rows`, or the share, each with
    the rank correlation: totals and means of what the log holds."""
    if any(table[key].dtype.is_nested() for table in (frame, taken, rows)):
        return {}
    numbers = [f.column for f in found.features if frame[f.column].dtype.is_numeric()]
    owners = frame.select(pl.col(key).cast(pl.String), *(pl.col(name).cast(pl.Float64).alias(name) for name in numbers))
    for name, table in ((_TAKEN, taken), (_ALL, rows)):
        counts = table.group_by(pl.col(key).cast(pl.String)).agg(pl.len().cast(pl.Float64).alias(name))
        owners = owners.join(counts, on=key, how="left").with_columns(pl.col(name).fill_null(0.0))
    owners = owners.with_columns((pl.col(_TAKEN) / pl.col(_ALL)).fill_nan(None).alias(_SHARE))
    shown = dict[str, float]()
    for name in numbers:
        known = owners.filter(pl.col(name).is_finite())
        if len(known) < MIN_ROWS or known[name].n_unique() < MIN_ROWS:
            continue
        best = max(_rank_correlation(known, name, told) for told in (_TAKEN, _ALL, _SHARE))
        shown |= {name: best} if best >= MIN_COUNTED else {}
    return shown


def _rank_correlation(frame: pl.DataFrame, one: str, other: str) -> float:
    """Return the absolute rank correlation of two columns; 0 if one of them has one value."""
    both = frame.select(one, other).drop_nulls().select(pl.all().rank())
    found = both.select(pl.corr(one, other)).item() if len(both) >= MIN_ROWS else None
    return abs(float(found)) if found is not None and math.isfinite(found) else 0.0


def _held(feature: SideFeature, column: pl.Series, own: pl.Series, pairs: pl.DataFrame, known: pl.Series) -> float:
    """Return the share of the pairs of a row's own id and its answer, of those whose own id has a value of a column, of which the column holds the
    answer; 0 for a share that is small or may be chance. `own` are the ids (n,) of the column, `known` the answers of all rows."""
    held = _values(feature, column, own, pairs, known)
    if held is None:
        return 0.0
    pairs = pairs.join(held.select(_OWN).unique(), on=_OWN, how="semi")
    if len(pairs) < MIN_ROWS:
        return 0.0
    owners, answers = pairs[_OWN].unique(), pairs[_OTHER].unique()
    own_codes, codes = _codes(pairs[_OWN], owners) * len(answers), _codes(pairs[_OTHER], answers)
    of_held = _codes(held[_OWN], owners), _codes(held[_OTHER], answers)
    cells = np.unique((of_held[0] * len(answers) + of_held[1])[(of_held[0] >= 0) & (of_held[1] >= 0)])
    if (share := float(np.isin(own_codes + codes, cells).mean())) <= MIN_HELD:
        return 0.0
    rng = np.random.default_rng(0)
    chance = float(np.mean([np.isin(own_codes + rng.permutation(codes), cells).mean() for _ in range(SHUFFLES)]))
    deviation = math.sqrt(chance * (1 - chance) / len(pairs))
    exceeds = share - chance > MIN_HELD * (1 - chance) and share - chance >= MIN_Z * deviation
    return share if exceeds else 0.0


def _codes(values: pl.Series, known: pl.Series) -> Ints:
    """Return the places (n,) of values among distinct ones, -1 for others."""
    places = pl.DataFrame({"value": known}).with_row_index("place")
    found = values.to_frame("value").join(places, on="value", how="left", maintain_order="left")["place"]
    return found.cast(pl.Int64).fill_null(-1).to_numpy()


def _values(
    feature: SideFeature, column: pl.Series, own: pl.Series, pairs: pl.DataFrame, known: pl.Series
) -> pl.DataFrame | None:
    """Return the pairs of an id and a value of a column, as text; None for a column of no ids."""
    is_listed = feature.is_text and column.dtype == pl.String and not names.names_phrase(feature.column)
    if not is_listed and feature.options["kind"] not in KINDS:
        return None
    rows = np.flatnonzero(own.is_in(pairs[_OWN].unique().implode()) & column.is_not_null())
    rows = np.random.default_rng(0).permutation(rows)
    column, own = column.gather(rows), own.gather(rows)
    separator = str(feature.options.get("separator", ""))
    if separator or column.dtype.is_nested():
        return _of_owners(own, *_in_lists(column, separator))
    if not is_listed:
        return _of_owners(own, np.arange(len(column)), _text(column))
    for separator in SEPARATORS:
        of_row, flat = _in_lists(column, separator)
        is_list = len(flat) >= MIN_SEVERAL * len(np.unique(of_row))
        if is_list and float(flat.is_in(known.implode()).mean() or 0) >= MIN_IDS:  # type: ignore[arg-type]
            return _of_owners(own, of_row, flat)
    return None


def _of_owners(own: pl.Series, of_row: Ints, values: pl.Series) -> pl.DataFrame:
    """Return the pairs of the ids of rows and of values, without missing ones."""
    return pl.DataFrame({_OWN: own.gather(of_row), _OTHER: values}).drop_nulls().filter(pl.col(_OTHER) != "")


def _in_lists(column: pl.Series, separator: str) -> tuple[Ints, pl.Series]:
    """Return the rows and the texts of the values of the first lists of a column, as many as hold MAX_VALUES."""
    listed = lists(column, separator)
    listed = listed.head(int((listed.list.len().cum_sum() <= MAX_VALUES).sum()) or 1)
    of_row, flat = explode(listed, "")
    return of_row, _text(flat)


def _text(values: pl.Series) -> pl.Series:
    """Return values as text, of one spelling, without what a program writes around those of a list."""
    return canonical_ids(values).cast(pl.String).str.strip_chars(_AROUND)
