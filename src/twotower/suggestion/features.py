"""Features of the columns of users and items by type and number of values, and the columns that hold the answers."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import polars as pl

from twotower.config.toml import TomlValue
from twotower.data.evidence import measure_constancy
from twotower.data.labels import POSITIVE
from twotower.data.reading.table_paths import table_source, takes_in
from twotower.errors import ConfigError
from twotower.features.date import fitting_formats
from twotower.features.schema import Schema
from twotower.features.side import SideName
from twotower.features.values import are_numbers, canonical_ids
from twotower.suggestion.roles import FORMATS, SAMPLED_ROWS, Roles, is_title, plain, role_of_name
from twotower.suggestion.tables import FoundTables

MIN_ROWS = 2  # rows of each value of a category, on average
MAX_CATEGORIES, MAX_NAMES = 1000, 10_000  # distinct values up to which text is categorical: any, and names of items
MAX_CODES, MAX_STEPS = 100, 12  # distinct whole numbers up to which they are categorical: from 0 or 1 on, and others
BUCKETS, DATE_BUCKETS = 10, 16
MIN_PRESENT = 0.05  # share of values that a column has
MIN_WORDS = 0.5  # share of values of two words from which a column is text
MIN_PHRASES = 0.1  # share of distinct values above which text is no category, and of values that hold a separator
SEPARATORS = {"|": (MAX_NAMES, 2), ";": (MAX_NAMES, 2), ",": (MAX_CATEGORIES, 5)}
"""Separators of lists in text: distinct parts up to which, and rows of each from which, a column holds lists."""
DATES = [f"{first}{sep}{second}{sep}%Y{clock}" for sep in "./-" for first, second in (("%d", "%m"), ("%m", "%d"))
         for clock in ("", " %H:%M", " %H:%M:%S")]  # fmt: skip
LIKELY_DAYS = -62_091, 84_006  # days since 1970 of 1800 and of 2200
MIN_HELD, MIN_OWNERS = 0.5, 20  # share of the rows, and number of them, whose answers a column holds
MIN_COUNTED = 0.9  # rank correlation with the number of rows of its ids from which a column may be counted from these
MIN_KNOWN = 0.8  # share of the ids of the log that a column of another name holds if it is the id of a table
MAX_ROWS = 100_000

_CHANGES = {"last", "latest", "updated", "modified"}
_WORDS = r"[\p{L}\p{N}]+"


@dataclass(frozen=True)
class SideFeature:
    """Feature of a column, with the reason for its kind."""

    column: str
    options: Mapping[str, TomlValue]  # kind, side, name and options
    why: str

    @property
    def is_text(self) -> bool:
        """True for text, and for vectors, which stand for text or images."""
        return self.options["kind"] in ("text", "vector")


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

    def made(kind: str, why: str, **options: TomlValue) -> SideFeature:
        return SideFeature(series.name, {"kind": kind, "side": side, "name": series.name, **options}, why)

    series = series.fill_nan(None) if series.dtype.is_float() else series
    present, words = series.drop_nulls(), {*plain(series.name).split("_")}
    if not len(present) or len(present) < MIN_PRESENT * len(series):
        return f"{series.null_count():,} of {len(series):,} values are missing"
    if series.dtype.is_nested():
        inner = getattr(series.dtype, "inner", None)
        if inner is None or inner.is_nested():
            return "values of several fields, or lists of lists"
        if not inner.is_float():
            return made("multi_hot", "lists of values")
        lengths = present.cast(pl.List(inner)).list.len()
        same = lengths.n_unique() == 1
        return made("vector", f"lists of {lengths[0]} numbers") if same else "lists of numbers of several lengths"
    distinct = present.n_unique()
    few, recurs = f"{distinct:,} distinct values", distinct * MIN_ROWS <= len(present)
    if distinct < 2:
        return "it has one value"
    if formats := _formats_of_dates(present):
        form, *others = formats
        if words & _CHANGES:
            return "a date that changes with the rows gives the answers away"
        if any(not formats[other].equals(formats[form]) for other in others):
            return f"its dates fit several formats, {' and '.join(formats)}; write them as year-month-day"
        options: dict[str, TomlValue] = {"format": form} if form else {}
        return made("date", f"{formats[form].n_unique():,} days, in buckets", buckets=DATE_BUCKETS, **options)
    if series.dtype.is_numeric():
        is_whole, is_code = bool((present == present.floor()).all()), bool(words & {"id", "code", "key"})
        most = MAX_CATEGORIES if is_code else MAX_CODES if present.min() in (0, 1) else MAX_STEPS
        if is_whole and recurs and distinct <= most:
            return made("categorical", few)
        if is_whole and (is_code or distinct == len(present)):
            return "whole numbers, nearly all distinct: a key"
        return made("numeric", f"{few} of numbers, in buckets", buckets=BUCKETS)
    if series.dtype == pl.String:
        is_phrase = is_title(series.name) or role_of_name(series.name) == "query"
        if are_numbers(present) and not recurs:
            return f"{few} of numbers that are text; make them numbers"
        if not is_phrase and (separator := _separator(present)):
            return made("multi_hot", f"lists separated by '{separator}'", separator=separator)
        if side == "item" and not is_phrase and _are_names(present) and distinct <= MAX_NAMES and recurs:
            return made("categorical", few)
        if is_text(present) and (distinct > len(series) * MIN_PHRASES or is_phrase):
            return made("text", f"{few}, of two words or more")
        if is_phrase and not recurs:
            return made("text", f"{few}, a title")
    return (
        made("categorical", few)
        if distinct <= MAX_CATEGORIES and recurs
        else f"{few}: too many for a category, and no text"
    )


def _formats_of_dates(present: pl.Series) -> dict[str, pl.Series]:
    """Return the days since 1970 of dates by the formats that read all of them; empty for other values."""
    if present.dtype in (pl.Date, pl.Datetime):
        return {"": present.cast(pl.Date).to_physical()}
    some = present.head(SAMPLED_ROWS) if present.dtype == pl.String else present.head(0)
    if not (len(some) and some.str.contains(r"\d").all() and some.str.contains(r"\D").all()):
        return {}
    found = fitting_formats(some, ("", *DATES, *FORMATS))
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


def _separator(values: pl.Series) -> str:
    """Return the separator of a text column of lists of few distinct values, "" for none."""
    for separator, (most, rows) in SEPARATORS.items():
        spaced = f"{separator} " if values.str.contains(f"{separator} ", literal=True).any() else separator
        parts, share = values.str.split(spaced).explode(), values.str.contains(separator, literal=True).mean()
        are_few = parts.n_unique() <= most and parts.n_unique() * rows <= len(parts)
        if float(share or 0) >= MIN_PHRASES and are_few and parts.equals(parts.str.strip_chars()):  # type: ignore[arg-type]
            return spaced
    return ""


def own_id(frame: pl.DataFrame, ids: pl.Series) -> str:
    """Return the only column of a side's table that holds the ids of the interactions, "" for none or several."""
    known = ids.drop_nulls().unique().cast(pl.String)
    keys = [s for s in frame if (s.dtype.is_integer() or s.dtype == pl.String) and not s.is_duplicated().any()]
    fits = [s.name for s in keys if float(known.is_in(s.cast(pl.String).implode()).mean() or 0) >= MIN_KNOWN]  # type: ignore[arg-type]
    return fits[0] if len(fits) == 1 else ""


def with_constant_columns(
    found: FoundTables, log: pl.DataFrame, roles: Roles, schema: Schema, output: Path | None,
    context: Collection[str] = (),
) -> FoundTables:  # fmt: skip
    """Return the tables, with tables of items and users made of columns of the checked interactions `log`.

    Such a column has no role, is in no table, not in `context`, and has one value in 99 % of the rows of each item or
    user. New files are named by `output`, the file of the config; without it tables of files get none, and none is
    added to a table that is given. Notes of `roles` name the columns that are left out. Raises ConfigError if a file
    exists."""
    ids = {"items": schema.item_id, "users": schema.user_id}
    known = {name for frame in (found.items, found.users) if frame is not None for name in frame.columns}
    left = [name for name in found.interactions.columns if name not in (*roles.named, *context)]
    for table in ("items", "users"):
        key, side, other = ids[table], table[:-1], ids["users" if table == "items" else "items"]
        free = [n for n in left if n not in known and not n.startswith("__") and not log[n].dtype.is_nested()]
        names = [n for n in free if measure_constancy(log[n], log[key], log[other]).exists]
        made = most_frequent(log, key, names)
        counted = counted_columns(guess_features(made, "item", key), made, key, log)
        roles.notes += [f"'{n}': one value for each {side}, which follows the number of its rows" for n in counted]
        left = [name for name in left if name not in names]
        if not (names := [name for name in names if name not in counted]):
            continue
        roles.notes[:] = [line for line in roles.notes if not line.startswith(tuple(f"'{n}'" for n in names))]
        shown = f"{', '.join(map(repr, names))} of the interactions"
        if getattr(found, table) is not None:
            roles.notes.append(f"{shown}, one value for each {side}; add them to the table of {table}")
            continue
        if found.section is not None and output is None:
            why = f"with an output file they are written as a table of {table}, which the config reads"
            roles.notes.append(f"{shown}, one value for each {side}; {why}")
            continue
        made, section, place = made.select(key, *names), found.section, ""
        if section is not None and output is not None:
            path = table_path(output, table)
            refuse_among_tables(found, path)
            if path.exists():
                raise ConfigError(f"{path}: exists already; choose another file for `output`, or remove this one")
            section, place = {**section, table: path.name}, f", in {path.name}; it does not follow later rows"
        note = f"table of {table}: {shown}, of each {side} the most frequent value{place}"
        found = replace(found, section=section, made=(*found.made, table), notes=(*found.notes, note))
        found = replace(found, items=made) if table == "items" else replace(found, users=made)
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


def most_frequent(log: pl.DataFrame, key: str, names: Collection[str]) -> pl.DataFrame:
    """Return a table of the ids of a log with the most frequent value of each column, of equal counts the smallest."""
    rows = log.select(key, *names).with_columns(pl.col(pl.Float32, pl.Float64).fill_nan(None))
    return rows.group_by(key).agg(pl.col(*names).drop_nulls().mode().min() if names else []).sort(key)


def without_answers(
    found: SideFeatures, frame: pl.DataFrame, side: SideName, ids: Mapping[SideName, str], rows: pl.DataFrame
) -> SideFeatures:
    """Return the features without those of columns that hold the answers of the checked `rows`, with a note each.

    Such a column lists the items that a user took, or the users who took an item. `frame` is the side's table, and
    `ids` has the columns of ids by side."""
    own, other = ids[side], ids["item" if side == "user" else "user"]
    rows = rows.filter(pl.col(POSITIVE))
    some = rows.sample(min(len(rows), MAX_ROWS), seed=0)
    pairs = pl.DataFrame({"own": _text(some[own]), "other": _text(some[other])}).drop_nulls()
    table = frame.with_columns(_text(frame[own]).alias("__own")).join(
        pairs, left_on="__own", right_on="own", how="semi"
    )
    shares = {f.column: _held_share(table["__own"], table[f.column], pairs) for f in found.features}
    what = f"of the {side}s, it holds the {'item' if side == 'user' else 'user'} of"
    notes = [f"'{n}' {what} {s:.0%} of the rows with a value of it: the answers" for n, s in shares.items() if s]
    features = tuple(f for f in found.features if not shares[f.column])
    title = "" if shares.get(found.title) else found.title
    return replace(found, features=features, title=title, notes=(*found.notes, *notes))


def _held_share(own: pl.Series, column: pl.Series, pairs: pl.DataFrame) -> float:
    """Return the share of the pairs of an id and an answer whose answer a column holds, 0 if few or by chance. A text
    may be the answer, or a list of answers."""
    if column.dtype.is_float() or column.dtype.is_temporal() or isinstance(column.dtype, pl.Struct):
        return 0.0
    values = pl.DataFrame({"own": own, "other": column}).drop_nulls().head(MAX_ROWS)
    if column.dtype == pl.String:
        parts = [pl.col("other").str.split(separator) for separator in ("\0", *SEPARATORS, " ")]
        values = values.select("own", other=pl.concat_list(parts))
    values = values.explode("other") if values["other"].dtype.is_nested() else values
    if values["other"].dtype.is_nested():
        return 0.0
    held = values.select("own", _text(values["other"]).alias("other")).unique()
    pairs = pairs.join(held, on="own", how="semi")

    def share(answers: pl.Series) -> float:
        return len(pairs.with_columns(answers.alias("other")).join(held, on=["own", "other"], how="semi")) / len(pairs)

    if len(pairs) < MIN_OWNERS or (found := share(pairs["other"])) <= MIN_HELD:
        return 0.0
    chance = share(pairs["other"].shuffle(0))
    return found if found - chance > MIN_HELD * (1 - chance) else 0.0


def _text(values: pl.Series) -> pl.Series:
    """Return values as text of one spelling, without what a program writes around the values of a list."""
    return canonical_ids(values).cast(pl.String).str.strip_chars(" []()'\"")


def counted_columns(found: SideFeatures, frame: pl.DataFrame, key: str, rows: pl.DataFrame) -> dict[str, float]:
    """Return the columns of numbers that follow the number of the `rows` of their ids, of the positives, or the share,
    each with the rank correlation: totals and means of what the log holds."""
    counts = rows.group_by(key).agg(__taken=pl.col(POSITIVE).sum(), __all=pl.len(), __share=pl.col(POSITIVE).mean())
    owners, shown = frame.join(counts, on=key), dict[str, float]()
    for name in (f.column for f in found.features if frame[f.column].dtype.is_numeric()):
        known = owners.select("__taken", "__all", "__share", own=pl.col(name).cast(pl.Float64))
        known = known.filter(pl.col("own").is_finite())
        if known["own"].n_unique() >= MIN_OWNERS:
            both = known.select(
                pl.corr(pl.col("own").rank(), pl.col(c).rank()).abs().fill_nan(0.0).alias(c) for c in known.columns[:3]
            )
            best = max(value or 0.0 for value in both.row(0))
            shown |= {name: best} if best >= MIN_COUNTED else {}
    return shown
