"""Features of the columns of users and items by type and number of values, and the columns that hold the answers."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import polars as pl

from twotower.config.toml import TomlValue
from twotower.data.constant_columns import measure_constancy
from twotower.data.table_paths import table_source, takes_in
from twotower.errors import ConfigError, DataError
from twotower.features.date import fitting_formats
from twotower.features.schema import Schema
from twotower.features.side import SIDES, SideName
from twotower.features.values import are_numbers, canonical_ids, explode, lists, missing_count
from twotower.suggestion.roles import Roles, is_title, plain, role_of_name
from twotower.suggestion.tables import FoundTables
from twotower.suggestion.times import FORMATS, SAMPLED_ROWS

MIN_ROWS = 2  # rows of each value of a category, on average
MAX_CATEGORIES, MAX_NAMES = 1000, 10_000  # distinct values up to which text is categorical: of users, and of items
MAX_NUMBERS, MAX_STEPS = 100, 12  # distinct whole numbers up to which they are categorical; measures such as years
BUCKETS, DATE_BUCKETS = 10, 16
MIN_PRESENT, MIN_SPARSE = 0.5, 0.05  # share of values that a column has; that a column of categories or lists has
MIN_WORDS = 0.5  # share of values of two words from which a column is text
MIN_PHRASES = 0.1  # share of distinct values above which text is no category, and of values that hold a separator
SEPARATORS = {"|": MAX_NAMES, ";": MAX_NAMES, ",": MAX_CATEGORIES, " ": 100}
"""Separators of lists in text, and the distinct parts up to which a column holds lists separated so."""
ORDERS = [f"{first}{sep}{second}{sep}%Y" for sep in "./-" for first, second in (("%d", "%m"), ("%m", "%d"))]
LIKELY_DAYS = -62_091, 84_006  # days since 1970 of 1800 and of 2200
MIN_HELD, MIN_Z, MIN_OWNERS = 0.5, 5.0, 20
"""A column holds the answers of more than this share of the rows, of more than shuffled rows by this number of standard
deviations, of at least this number of rows."""
MIN_COUNTED = 0.9  # rank correlation with the number of rows of its ids from which a column may be counted from these
MIN_KNOWN = 0.8  # share of the ids of the log that a column of another name holds if it is the id of a table
MAX_ROWS, SHUFFLES = 100_000, 5
TEXT_KINDS = ("text", "vector")

_MEASURES = "year age price cost length duration minutes pages width height size rooms salary income"
_CHANGES = "last latest updated update modified changed seen visited reviewed sold loaded"
_WORDS = r"[\p{L}\p{N}]+"


@dataclass(frozen=True)
class SideFeature:
    """Feature of a column, with the reason for its kind."""

    column: str
    options: Mapping[str, TomlValue]  # kind, side, name and options
    why: str
    is_text: bool = False  # True for text, and for vectors, which stand for text or images


@dataclass(frozen=True)
class SideFeatures:
    """Features of a table."""

    features: tuple[SideFeature, ...] = ()
    title: str = ""  # column of the titles; empty: none
    notes: tuple[str, ...] = ()  # columns that are left out
    counted: Mapping[str, float] = field(default_factory=dict)
    """Columns that follow the number of rows, with the correlation."""


def guess_features(frame: pl.DataFrame, side: SideName, key: str) -> SideFeatures:
    """Return the features of a table of users or items, whose ids are in the column `key`."""
    own = "a name of the package's own; rename it"
    found = {s.name: own if s.name.startswith("__") else _feature(s, side) for s in frame if s.name != key}
    titles = [name for name in found if side == "item" and frame[name].dtype == pl.String and is_title(name)]
    title = min(titles, key=lambda name: plain(name) != "title", default="")
    notes = (f"'{name}' of the {side}s, {why}" for name, why in found.items() if isinstance(why, str))
    return SideFeatures(tuple(f for f in found.values() if not isinstance(f, str)), title, tuple(notes))


def _feature(series: pl.Series, side: SideName) -> SideFeature | str:
    """Return the feature of a column, or the reason that it has none."""
    n, present = len(series), series.drop_nulls()
    if len(present) and len(present) >= n * MIN_SPARSE:
        is_sparse = len(present) < n * MIN_PRESENT
        found = _of_present(present if is_sparse else series, present, side)
        if not is_sparse or (not isinstance(found, str) and found.options["kind"] in ("categorical", "multi_hot")):
            return found
    return f"{n - len(present):,} of {n:,} values are missing"


def _of_present(series: pl.Series, present: pl.Series, side: SideName) -> SideFeature | str:
    """Return the feature of a column by its values that are not missing, or the reason that it has none."""

    def made(kind: str, why: str, **options: TomlValue) -> SideFeature:
        named = {"kind": kind, "side": side, "name": series.name, **options}
        return SideFeature(series.name, named, why, kind in TEXT_KINDS)

    n, words = len(series), {*plain(series.name).split("_")}
    is_phrase = is_title(series.name) or role_of_name(series.name) == "query"
    if series.dtype.is_nested():
        inner = getattr(series.dtype, "inner", None)
        if inner is None or inner.is_nested():
            return "values of several fields, or lists of lists"
        lengths = pl.select(pl.lit(present).cast(pl.List(inner)).list.len()).to_series()
        if not inner.is_float():
            return made("multi_hot", "lists of values")
        one = lengths.n_unique() == 1
        return made("vector", f"lists of {lengths[0]} numbers") if one else "lists of numbers of several lengths"
    distinct = present.n_unique()
    few, each = f"{distinct:,} distinct values", distinct * MIN_ROWS <= n
    if distinct < 2:
        return "it has one value"
    if formats := _formats_of_dates(present):
        form, *others = formats
        if words & {*_CHANGES.split()}:
            return "a date that changes with the rows gives the answers away"
        if any(not formats[other].equals(formats[form]) for other in others):
            return f"its dates fit several formats, {' and '.join(formats)}; write them as year-month-day"
        options: dict[str, TomlValue] = {"format": form} if form else {}
        return made("date", f"{formats[form].n_unique():,} days, in buckets", buckets=DATE_BUCKETS, **options)
    if series.dtype.is_numeric():
        is_measure, is_code = bool(words & {*_MEASURES.split()}), bool(words & {"id", "code", "key"})
        is_whole = series.dtype.is_integer() or (missing_count(series) and bool((present == present.floor()).all()))
        if is_whole and each and (is_code or distinct <= (MAX_STEPS if is_measure else MAX_NUMBERS)):
            return made("categorical", few)
        if is_whole and (is_code or (distinct == len(present) and not is_measure)):
            return "whole numbers, nearly all distinct: a key"
        return made("numeric", f"{few} of numbers, in buckets", buckets=BUCKETS)
    if series.dtype == pl.String:
        if are_numbers(present) and not each:
            return f"{few} of numbers that are text; make them numbers"
        if separator := _separator(present, side, is_phrase):
            return made("multi_hot", f"lists separated by '{separator}'", separator=separator)
        is_name = side == "item" and not is_phrase and _are_names(present)
        if is_name and distinct <= MAX_NAMES and distinct * MIN_ROWS <= len(present):
            return made("categorical", few)
        if is_text(present) and (distinct > n * MIN_PHRASES or is_phrase):
            return made("text", f"{few}, of two words or more")
    if distinct <= MAX_CATEGORIES and each:
        return made("categorical", few)
    return made("text", f"{few}, a title") if is_phrase else f"{few}: too many for a category, and no text"


def _formats_of_dates(present: pl.Series) -> dict[str, pl.Series]:
    """Return the days since 1970 of dates by the formats that read all of them; empty for other values."""
    if present.dtype in (pl.Date, pl.Datetime):
        return {"": present.cast(pl.Date).to_physical()}
    some = present.head(SAMPLED_ROWS) if present.dtype == pl.String else present.head(0)
    if not (len(some) and some.str.contains(r"\d").all() and some.str.contains(r"\D").all()):
        return {}
    known = [f"{order}{clock}" for order in ORDERS for clock in ("", " %H:%M", " %H:%M:%S")]
    found = fitting_formats(some, ("", *known, *FORMATS))
    likely = [form for form, days in found.items() if days.is_between(*LIKELY_DAYS).all()]
    return fitting_formats(present, likely) if likely else {}


def is_text(values: pl.Series) -> bool:
    """Return True for a column of which MIN_WORDS or more of the values have two words or more, and a letter."""
    if values.dtype != pl.String:
        return False
    present = values.drop_nulls()
    words = present.str.count_matches(_WORDS) + present.str.count_matches(r"\p{Han}")
    are_words = (words >= 2) & present.str.contains(r"\p{L}")  # 12.50 is no text
    return bool(len(present)) and float(are_words.mean() or 0) >= MIN_WORDS  # type: ignore[arg-type]


def _are_names(values: pl.Series) -> bool:
    """Return True for values of up to three words."""
    return float(values.str.count_matches(_WORDS).median() or 0) <= 3  # type: ignore[arg-type]


def _separator(values: pl.Series, side: SideName, is_phrase: bool) -> str:
    """Return the separator of a text column of lists of few distinct values, "" for none."""
    for separator, most in SEPARATORS.items():
        if float(values.str.contains(separator, literal=True).mean() or 0) < MIN_PHRASES:  # type: ignore[arg-type]
            continue
        spaced = f"{separator} " if values.str.contains(f"{separator} ", literal=True).any() else separator
        parts = values.str.split(spaced).explode()
        words = values.unique().str.split(separator).explode()  # of phrases few stand in several values
        is_prose = separator == " " and 2 * words.n_unique() > len(words)
        if is_prose or (is_phrase and separator in ", ") or not parts.equals(parts.str.strip_chars()):
            continue
        are_clear = side == "item" and separator in "|;" and not is_phrase and _are_names(parts)
        if parts.n_unique() * (MIN_ROWS if are_clear else 5) <= len(parts):
            return spaced if parts.n_unique() <= (most if are_clear else min(most, MAX_CATEGORIES)) else ""
    return ""


def own_id(frame: pl.DataFrame, ids: pl.Series, side: SideName) -> str:
    """Return the column of a side's table that holds the ids of the interactions, "" for none. Raises DataError if
    several do."""
    known = ids.drop_nulls().unique().cast(pl.String)
    keys = [s for s in frame if (s.dtype.is_integer() or s.dtype == pl.String) and not s.is_duplicated().any()]
    fits = [s.name for s in keys if float(known.is_in(s.cast(pl.String).implode()).mean() or 0) >= MIN_KNOWN]  # type: ignore[arg-type]
    if len(fits) > 1:
        raise DataError(
            f"{side}s: {' and '.join(map(repr, fits))} may hold the ids that '{ids.name}' of the interactions has; set "
            f"schema.{side}s_id = '{fits[0]}' to say so"
        )
    return fits[0] if fits else ""


def features_of_schema(schema: Schema, side: SideName) -> SideFeatures:
    """Return the features of a data set's own schema, without ids and histories."""
    made = []
    for f in schema.columns(side):
        if f.source != schema.id_column(side) and not f.computes:
            options = {"kind": f.kind, "side": f.side, "name": f.name} | f.model_dump(
                mode="json", exclude_defaults=True
            )
            made.append(SideFeature(f.source, options, "as the data set has it", f.searchable))
    return SideFeatures(tuple(made), schema.title if side == "item" else "")


def with_constant_columns(
    found: FoundTables, roles: Roles, schema: Schema, output: Path | None, context: Collection[str] = ()
) -> FoundTables:
    """Return the tables, with tables of items and users made of columns of the interactions.

    Such a column has no role, is in no table, not in `context`, and has one value in 99 % of the rows of each item or
    user. New files are named by `output`, the file of the config; without it tables of files get none. Notes of `roles`
    name the columns that are left out. Raises ConfigError if a file exists."""
    log, ids = found.interactions, {"items": schema.item_id, "users": schema.user_id}
    left = [name for name in log.columns if name not in (*roles.named, *context)]
    for table in () if found.schema else ("items", "users"):
        key, side, other = ids[table], table[:-1], ids["users" if table == "items" else "items"]
        has = {name for frame in (found.items, found.users) if frame is not None for name in frame.columns}
        is_point = found.is_text and log[key].dtype.is_float()  # an id such as 7.0, which a file of a table changes
        free = [n for n in left if n not in has and not n.startswith("__") and not is_point]
        made = _values_of_ids(log, key, [n for n in free if measure_constancy(log[n], log[key], log[other]).exists])
        counted = counted_columns(guess_features(made, "item", key), made, key, taken_rows(log, roles, schema), log)
        roles.notes += [
            f"'{name}': one value for each {side}, which follows the number of its rows" for name in counted
        ]
        left = [name for name in left if name not in made.columns]
        if names := [name for name in made.columns if name not in (key, *counted)]:
            roles.notes[:] = [line for line in roles.notes if not line.startswith(tuple(f"'{n}'" for n in names))]
            own = str(roles.options.get(f"{table}_id") or key)
            found = _with_table(found, table, made.select(pl.col(key).alias(own), *names), own, output, roles)
    named = {name for note in (*roles.notes, *found.notes) for name in note.split("'")[1::2]}
    if left := [f"'{name}'" for name in left if name not in named]:
        roles.notes.append(f"{', '.join(left)} of the interactions")
    return found


def table_path(output: Path, table: str) -> Path:
    """Return the file of a table by the file of its config."""
    return output.with_name(f"{output.stem}.{table}.parquet")


def refuse_among_tables(found: FoundTables, path: Path) -> None:
    """Raise ConfigError for a path in the folder of the config that would be read with one of the tables."""
    named = {name: value for name, value in (found.section or {}).items() if name not in ("format", "dataset")}
    for source in map(table_source, map(str, named.values())):
        if takes_in(path.parent / source if isinstance(source, Path) else source, path):
            raise ConfigError(f"{path}: would be read with the files of {source}; choose another folder for `output`")


def _values_of_ids(log: pl.DataFrame, key: str, names: Collection[str]) -> pl.DataFrame:
    """Return a table of the ids of a log with the most frequent value of each column, of equal counts the smallest."""
    rows = log.select(key, *names).with_columns(pl.col(pl.Float32, pl.Float64).fill_nan(None))
    table = rows.filter(pl.col(key).cast(pl.String) != "").select(pl.col(key).unique().sort())
    for name in names:
        counts = rows.select(key, name).drop_nulls().group_by(key, name).agg(__n=pl.len())
        best = counts.sort("__n", name, descending=[True, False]).unique(key, keep="first", maintain_order=True)
        table = table.join(best.select(key, name), on=key, how="left", maintain_order="left")
    return table


def _with_table(
    found: FoundTables, table: str, made: pl.DataFrame, own: str, output: Path | None, roles: Roles
) -> FoundTables:
    """Return the tables with `made` as a table, or added to the one that is given, and with a note of the tables, or of
    `roles` if it cannot be read. Raises ConfigError if its file exists."""
    given, section = getattr(found, table), found.section
    listed = f"{', '.join(map(repr, made.columns[1:]))} of the interactions"
    form = (section or {}).get("format")
    separators = form.get("separators", ()) if isinstance(form, Mapping) else ()
    if (given is not None and own not in given.columns) or table in separators:  # type: ignore[operator]
        roles.notes.append(f"{listed}, one value for each {table[:-1]}; add them to the table of {table}")
        return found
    if section is not None and output is None:
        why = f"with an output file they are written as a table of {table}, which the config reads"
        roles.notes.append(f"{listed}, one value for each {table[:-1]}; {why}")
        return found
    note = f"table of {table}: {listed}, of each {table[:-1]} the most frequent value"
    if given is not None:
        made = made.select(pl.col(own).cast(pl.String).alias("__key"), pl.exclude(own))
        given = given.with_columns(pl.col(own).cast(pl.String).alias("__key"))
        made = given.join(made, on="__key", how="left", maintain_order="left").drop("__key")
        note += f", added to the table of {table}"
    if section is not None and output is not None:
        path = table_path(output, table)
        refuse_among_tables(found, path)
        if path.exists():
            raise ConfigError(f"{path}: exists already; choose another file for `output`, or remove this one")
        section, note = {**section, table: path.name}, f"{note}, in {path.name}; it does not follow later rows"
    found = replace(found, section=section, made=(*found.made, table), notes=(*found.notes, note))
    return replace(found, items=made) if table == "items" else replace(found, users=made)


def taken_rows(rows: pl.DataFrame, roles: Roles, schema: Schema) -> pl.DataFrame:
    """Return the interactions that are positives by a label of numbers or by the types of events."""
    label, above = str(roles.options.get("label") or ""), float(str(roles.options.get("positive_above", 0)))
    if label and (rows[label].dtype.is_numeric() or rows[label].dtype == pl.Boolean):
        return rows.filter(pl.col(label).cast(pl.Float64) > above)
    if not schema.event:
        return rows
    positive = {kind: rule.target == "positive" and rule.weight > 0 for kind, rule in schema.events.items()}
    kinds = rows[schema.event].cast(pl.String)
    taken = [kind for kind in kinds.unique().drop_nulls() if positive.get(kind, positive.get("*", False))]
    return rows.filter(kinds.is_in(taken).fill_null(False))


def without_answers(
    found: SideFeatures, frame: pl.DataFrame, side: SideName, ids: Mapping[SideName, str], rows: pl.DataFrame
) -> SideFeatures:
    """Return the features without those of columns that hold the answers of `rows`, the positives, with a note each.

    Such a column lists the items that a user took, or the users who took an item. `frame` is the side's table, and
    `ids` has the columns of ids by side."""
    other = next(name for name in SIDES if name != side)
    if not len(rows) or rows[ids[side]].dtype.is_nested() or rows[ids[other]].dtype.is_nested():
        return found
    some = rows.sample(min(len(rows), MAX_ROWS), seed=0)
    pairs = pl.DataFrame({"own": _text(some[ids[side]]), "other": _text(some[ids[other]])}).drop_nulls()
    own, known = _text(frame[ids[side]]), _text(rows[ids[other]].unique())
    shares = {f.column: _held_share(f, frame[f.column], own, pairs, known) for f in found.features}
    notes = [
        f"'{name}' of the {side}s, it holds the {other} of {share:.0%} of the rows with a value of it: the answers"
        for name, share in shares.items()
        if share
    ]
    features = tuple(f for f in found.features if not shares[f.column])
    title = "" if shares.get(found.title) else found.title
    return replace(found, features=features, title=title, notes=(*found.notes, *notes))


def _held_share(
    feature: SideFeature, column: pl.Series, own: pl.Series, pairs: pl.DataFrame, known: pl.Series
) -> float:
    """Return the share of the pairs of an id and an answer whose answer the column holds, 0 if few or by chance."""
    rows = pl.DataFrame({"own": own, "other": column}).join(pairs.select("own").unique(), on="own", how="semi")
    rows = rows.drop_nulls().head(MAX_ROWS)
    separator = str(feature.options.get("separator", ""))
    if feature.is_text and column.dtype == pl.String and not is_title(column.name):  # many ids look like text
        parts = {
            s: _text(rows["other"].str.split(s).explode()).is_in(known.implode()).mean() or 0.0 for s in SEPARATORS
        }
        separator = max(parts, key=lambda s: parts[s])
        if parts[separator] < MIN_HELD:  # type: ignore[operator]
            return 0.0
    elif feature.options["kind"] not in ("categorical", "multi_hot", "numeric"):
        return 0.0
    if separator or column.dtype.is_nested():
        of_row, flat = explode(lists(rows["other"], separator), "")
        rows = pl.DataFrame({"own": rows["own"].gather(of_row), "other": flat})
    held = rows.select("own", _text(rows["other"]).alias("other")).unique()
    pairs = pairs.join(held.select("own").unique(), on="own", how="semi")

    def share(answers: pl.Series) -> float:
        return len(pairs.with_columns(answers.alias("other")).join(held, on=["own", "other"], how="semi")) / len(pairs)

    if len(pairs) < MIN_OWNERS or (found := share(pairs["other"])) <= MIN_HELD:
        return 0.0
    chance = float(np.mean([share(pairs["other"].shuffle(seed)) for seed in range(SHUFFLES)]))
    deviation = math.sqrt(chance * (1 - chance) / len(pairs))
    return found if found - chance > max(MIN_HELD * (1 - chance), MIN_Z * deviation) else 0.0


def _text(values: pl.Series) -> pl.Series:
    """Return values as text of one spelling, without what a program writes around the values of a list."""
    return canonical_ids(values).cast(pl.String).str.strip_chars(" []()'\"")


def counted_columns(
    found: SideFeatures, frame: pl.DataFrame, key: str, taken: pl.DataFrame, rows: pl.DataFrame
) -> dict[str, float]:
    """Return the columns of numbers that follow the number of the `taken` rows of their ids, of all `rows`, or the
    share, each with the rank correlation: totals and means of what the log holds."""
    numbers = [f.column for f in found.features if frame[f.column].dtype.is_numeric()]
    owners = frame.select(pl.col(key).cast(pl.String), *(pl.col(name).cast(pl.Float64) for name in numbers))
    for name, table in (("__taken", taken), ("__all", rows)) if numbers else ():
        counts = table.group_by(pl.col(key).cast(pl.String)).agg(pl.len().cast(pl.Float64).alias(name))
        owners = owners.join(counts, on=key, how="left").with_columns(pl.col(name).fill_null(0.0))
    shown = dict[str, float]()
    for name in numbers:
        known = owners.filter(pl.col(name).is_finite() & (pl.col("__all") > 0))
        if len(known) >= MIN_OWNERS and known[name].n_unique() >= MIN_OWNERS:
            ranks = known.select(name, "__taken", "__all", share=pl.col("__taken") / pl.col("__all")).select(
                pl.all().rank()
            )
            both = ranks.select(pl.corr(name, other).abs().fill_nan(0.0).alias(other) for other in ranks.columns[1:])
            best = max(value or 0.0 for value in both.row(0))
            shown |= {name: best} if best >= MIN_COUNTED else {}
    return shown
