"""Features of the columns of a table of users or items, guessed from their values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import polars as pl

from twotower.config.toml import TomlValue
from twotower.errors import DataError
from twotower.features.date import days, fitting_formats
from twotower.features.side import SideName
from twotower.features.values import are_numbers, missing_count
from twotower.suggestion import names
from twotower.suggestion.guessed_columns import is_distinct
from twotower.suggestion.time_form import FORMATS, SAMPLED_ROWS, is_dated

MAX_CATEGORIES = 1000
"""Distinct values up to which a column is categorical, if each stands for MIN_ROWS rows on average."""
MIN_ROWS = 2
MAX_NAMES = 10_000
"""Distinct values of items up to which a column of names, such as authors, or of codes is categorical under the same condition."""
MIN_SHARED = 0.5
"""Share of items whose name, such as that of a director, another item has too, from which names of items are categorical too: names are as unequal
as their fame, so that most items tell something of others by theirs while most names stand for one item; below it most items have a value of their
own, as titles have."""
MAX_WORDS = 3
"""Words of a name at most, the median; longer texts are no names."""
MAX_NUMBERS = 100
"""Distinct whole numbers up to which a column of numbers is categorical, unless its name tells a measure."""
MAX_STEPS = 12
"""Distinct whole numbers up to which a measure, such as a number of rooms, is categorical. More of them, such as years, are alike where they
are near."""
BUCKETS = 10
"""Buckets of a column of numbers."""
ORDERS = [f"{first}{sep}{second}{sep}%Y" for sep in "./-" for first, second in (("%d", "%m"), ("%m", "%d"))]
LIKELY_DAYS = -62_091, 84_006
"""Days from 1970 of 1800 and of 2200, between which dates of users and items lie: 1.2 is a version, and no February of the year 2."""
MAX_DATE = 40
"""Letters of the text of a date at most."""
CLOCKS = ("", " %H:%M", " %H:%M:%S")
"""Formats of dates whose year is last, and of clocks beside them."""
DATE_BUCKETS = 16
"""Buckets of a column of dates."""
MIN_WORDS = 0.5
"""Share of values of two words or more from which a column is text."""
SEPARATORS = {"|": MAX_NAMES, ";": MAX_NAMES, ",": MAX_CATEGORIES, " ": 100}
"""Separators of lists in text, and the distinct names of items up to which a column holds lists separated so; of what are no names at most
MAX_CATEGORIES. A comma or a space stands in names and sentences too."""
MIN_PARTS = {"|": MIN_ROWS, ";": MIN_ROWS}
"""Parts of such a column of names for each of its distinct ones, on average; 5 of other columns and separators."""
MIN_PHRASES = 0.1
"""Distinct values, as a share of the rows, above which such a column is text and no category."""
MIN_SEVERAL = 0.1
"""Share of values with a separator from which a column holds lists."""

MIN_PRESENT = 0.5
"""Share of values that are not missing from which a column is read."""
MIN_SPARSE, SPARSE_KINDS = 0.05, ("categorical", "multi_hot")
"""That of these kinds, of which a missing value is none among the others."""
MIN_RECURRING = 2
"""Distinct values that hold a word, on average, from which words are a list and not a phrase."""

_WORDS = r"[\p{L}\p{N}]+"
_BETWEEN = r"[|;,]"
_WORD = r"\p{L}{3}|\p{Han}{2}"
_SYLLABLES = r"\p{L}{2,}|\p{Han}"
_NO_NAME = r"://|^\S*(\p{L}\d+\p{L}|@)\S*$"
"""Addresses, and codes such as B00X4WHP5E: one word with digits between letters."""
_IN_BRACKETS = r"^\s*(\[.*\]|\(.*\)|\{.*\})\s*$"


@dataclass(frozen=True)
class SideFeature:
    """Feature of a column, with the reason for its kind."""

    column: str
    options: Mapping[str, TomlValue]
    """Kind, side, name and options."""
    why: str
    is_text: bool = False
    """True for text, and for vectors, which stand for text or images."""
    is_name: bool = False
    """True for names of so many values that they tell few items apart from those of other columns."""


@dataclass(frozen=True)
class SideFeatures:
    """Features of a table, the column of its titles, and the columns that are left out."""

    features: tuple[SideFeature, ...] = ()
    title: str = ""
    """Empty: none."""
    notes: tuple[str, ...] = ()


def guess_features(frame: pl.DataFrame, side: SideName, key: str) -> SideFeatures:
    """Return the features of a table of users or items, whose ids are in the column `key`."""
    reserved = [name for name in frame.columns if name.startswith("__")]
    notes = [
        f"'{name}' of the {side}s: names that begin with '__' are the package's own; rename it" for name in reserved
    ]
    frame, features, titles = frame.drop(reserved), [], []
    for series in frame:
        if series.name == key:
            continue
        found = _feature(series, side)
        if isinstance(found, str):
            notes.append(f"'{series.name}' of the {side}s, {found}")
        else:
            features.append(found)
        if side == "item" and series.dtype == pl.String and names.names_title(series.name):
            titles.append(series.name)
    texts = [f.column for f in features if f.is_text and is_text(frame[f.column])]
    alike = [] if titles or side != "item" else [s for s in frame if s.name != key and _may_name_rows(s)]
    alike.sort(key=lambda s: float(s.str.len_chars().median() or 0))  # type: ignore[arg-type]
    title = next(iter([*titles, *(s.name for s in alike), *texts]), "") if side == "item" else ""
    return SideFeatures(tuple(features), title, tuple(notes))


def lists_in_brackets(features: SideFeatures, frame: pl.DataFrame, side: SideName) -> list[str]:
    """Return a line for each column of lists in text that has them in brackets, as programs print lists: these stay part of the values."""
    lines = list[str]()
    for name in (f.column for f in features.features if "separator" in f.options):
        values = frame[name].drop_nulls()
        printed = values.filter(values.str.contains(_IN_BRACKETS))
        if 2 * len(printed) > len(values):
            lines.append(
                f"'{name}' of the {side}s: lists such as {printed[0]:.40}, whose brackets and quotes stay part of the values; write the values alone, "
                "such as a|b, or give a column of lists"
            )
    return lines


def _feature(series: pl.Series, side: SideName) -> SideFeature | str:
    """Return the feature of a column, or the reason that it has none."""
    n, present = len(series), series.drop_nulls()
    missing = f"{n - len(present):,} of {n:,} values are missing"
    if len(present) >= n * MIN_PRESENT:
        return _of_present(series, present, side)
    if len(present) < n * MIN_SPARSE or not len(present):
        return missing
    found = _of_present(series, present, side)
    recurs = not isinstance(found, str) and found.options["kind"] in SPARSE_KINDS and _stand_for_rows(present, found)
    return found if recurs else missing


def _stand_for_rows(present: pl.Series, found: SideFeature) -> bool:
    """Return True if each value of a column of categories or lists stands for MIN_ROWS of the rows that have one, on average."""
    separator = found.options.get("separator")
    if present.dtype.is_nested():
        present = present.to_frame("v").select(pl.col("v").cast(pl.List(pl.String)).explode()).to_series().drop_nulls()
    elif isinstance(separator, str):
        present = present.str.split(separator).explode()
    return present.n_unique() * MIN_ROWS <= len(present)


def _of_present(series: pl.Series, present: pl.Series, side: SideName) -> SideFeature | str:
    """Return the feature of a column by its values that are not missing, or the reason that it has none."""
    n = len(series)
    if series.dtype.is_nested():
        return _of_lists(series, side)
    distinct = present.n_unique()
    if distinct < 2:
        return "it has one value"
    if is_dated(series) or (series.dtype == pl.String and _formats_of_dates(series)):
        return _of_dates(series, side)
    few = f"{distinct:,} distinct values"
    if series.dtype.is_float() and (missing_count(series) > n / 2):
        return "most values are not finite"
    # Programs write whole numbers beside missing values as 1.0.
    is_whole = series.dtype.is_integer() or (
        series.dtype.is_float() and bool(missing_count(series)) and _are_whole(present)
    )
    is_code = series.dtype.is_numeric() and names.names_code(series.name) and _are_whole(present)
    is_measure = names.names_measure(series.name)
    most_whole = MAX_STEPS if is_measure else MAX_NUMBERS
    if series.dtype.is_numeric() and not is_code and not (is_whole and distinct <= most_whole):
        if distinct == len(present) and series.dtype.is_integer() and not is_measure:
            return "whole numbers, all distinct: a key"
        return _made(series, side, "numeric", f"{few} of numbers, in buckets", buckets=BUCKETS)
    recurs = side == "item" and distinct <= MAX_NAMES and distinct * MIN_ROWS <= len(present)
    if is_code and recurs:
        return replace(_made(series, side, "categorical", f"{few} of a code"), is_name=distinct > MAX_CATEGORIES)
    if series.dtype == pl.String:
        if are_numbers(present) and (is_measure or distinct * MIN_ROWS > n):  # others may be versions, such as 1.10
            whole = not present.str.contains(".", literal=True).any()
            numbers, some = (s.cast(pl.Int64 if whole else pl.Float64, strict=False) for s in (series, present))
            found = _of_present(numbers, some, side)
            if not isinstance(found, str) and found.options["kind"] == "numeric":
                return f"{few} of numbers that are text; make them numbers"
        if separator := _separator(present, side):
            return _made(series, side, "multi_hot", f"lists separated by '{separator}'", separator=separator)
        is_phrase = names.names_phrase(series.name)
        shared = _shared(present) if side == "item" and distinct <= MAX_NAMES and not recurs else 0.0
        if (recurs or shared >= MIN_SHARED) and not is_phrase and _are_names(present):
            many = not recurs or distinct > MAX_CATEGORIES or (is_text(present) and distinct > n * MIN_PHRASES)
            why = few if recurs else f"{few}, and {shared:.0%} have one that another has too"
            return replace(_made(series, side, "categorical", why), is_name=many)
        if is_text(present) and (distinct > n * MIN_PHRASES or is_phrase):
            return _text(series, side, f"{few}, of two words or more")
    if distinct <= MAX_CATEGORIES and distinct * MIN_ROWS <= n:
        return _made(series, side, "categorical", few)
    if series.dtype == pl.String and names.names_title(series.name):
        return _text(series, side, f"{few}, a title")
    most = MAX_NAMES if side == "item" and (series.dtype == pl.String or is_code) else MAX_CATEGORIES
    return f"{few} in {n:,} rows: too many for a category (at most {most:,}, each of {MIN_ROWS} rows), and no text"


def _of_dates(series: pl.Series, side: SideName) -> SideFeature | str:
    """Return the feature of a column of dates, or the reason that it has none."""
    if names.names_change(series.name):
        return "a date that changes with the rows gives the answers away"
    guessed = [""] if series.dtype != pl.String else _formats_of_dates(series)
    fits = {form: read for form in guessed if (read := _days(series, form)) is not None}
    if not fits:
        return "no format that is tried reads all its dates; write them as year-month-day"
    form, first = next(iter(fits.items()))
    if not all(first.equals(other) for other in fits.values()):
        return f"its dates fit several formats, {' and '.join(fits)}; write them as year-month-day"
    options: dict[str, TomlValue] = {"format": form} if form else {}
    return _made(series, side, "date", f"{first.n_unique():,} days, in buckets", buckets=DATE_BUCKETS, **options)


def _formats_of_dates(series: pl.Series) -> list[str]:
    """Return the formats that read the first SAMPLED_ROWS values of text as dates, of births and of coming events too; none for text of digits alone,
    which may be codes."""
    text = series.drop_nulls().str.strip_chars()
    some = text.filter(text != "").unique(maintain_order=True).head(SAMPLED_ROWS)
    looks_so = len(some) and some.str.contains(r"\d").all() and some.str.contains(r"\D").all()
    if not looks_so or (some.str.len_chars() > MAX_DATE).any():
        return []
    known = [*(f"{order}{clock}" for order in ORDERS for clock in CLOCKS), *FORMATS]
    found = fitting_formats(some, ("", *known))
    return [form for form, read in found.items() if read.is_between(*LIKELY_DAYS).all()]


def _days(series: pl.Series, form: str) -> pl.Series | None:
    """Return the days of a column of a format, None for values that have another one."""
    try:
        return days(series, form)
    except DataError:
        return None


def _made(series: pl.Series, side: SideName, kind: str, why: str, **options: TomlValue) -> SideFeature:
    return SideFeature(series.name, {"kind": kind, "side": side, "name": series.name} | options, why)


def _text(series: pl.Series, side: SideName, why: str, kind: str = "text") -> SideFeature:
    return replace(_made(series, side, kind, why), is_text=True)


def _of_lists(series: pl.Series, side: SideName) -> SideFeature | str:
    inner = getattr(series.dtype, "inner", None)
    if inner is None:
        return "values of several fields"
    if inner.is_float():
        lengths = series.drop_nulls().to_frame("v").select(pl.col("v").cast(pl.List(pl.Float64)).list.len()).to_series()
        if lengths.n_unique() > 1:
            return "lists of numbers of several lengths"
        return _text(series, side, f"lists of {lengths[0]} numbers", "vector")
    if inner.is_nested():
        return "lists of lists"
    return _made(series, side, "multi_hot", "lists of values")


def _are_whole(values: pl.Series) -> bool:
    """Return True for finite numbers without fractions, as a program writes whole ones beside missing ones."""
    numbers = values.cast(pl.Float64).fill_nan(None).drop_nulls()
    return len(numbers) > 0 and bool((numbers.is_finite() & (numbers.floor() == numbers)).all())


def is_text(values: pl.Series) -> bool:
    """Return True for a column of which MIN_WORDS or more of the values have two words or more, and a letter."""
    if values.dtype != pl.String:
        return False
    present = values.drop_nulls()
    words = present.str.count_matches(_WORDS) + present.str.count_matches(r"\p{Han}")
    are_words = (words >= 2) & present.str.contains(r"\p{L}")  # 12.50 is no text
    return bool(len(present)) and float(are_words.mean() or 0) >= MIN_WORDS  # type: ignore[arg-type]


def _may_name_rows(series: pl.Series) -> bool:
    """Return True for text of words that differ in nearly all rows, and that are no codes, web addresses or dates."""
    present = series.drop_nulls()
    if series.dtype != pl.String or len(present) < MIN_PRESENT * len(series) or not is_distinct(present):
        return False
    if float(present.str.contains(_NO_NAME).mean() or 0) >= MIN_WORDS or is_dated(series) or _formats_of_dates(series):  # type: ignore[arg-type]
        return False
    letters = present.str.replace_all(r"[^\p{L}]", "")
    are_words = float(present.str.contains(_WORD).mean() or 0) >= MIN_WORDS  # type: ignore[arg-type]
    several = float((present.str.count_matches(_SYLLABLES) >= 2).mean() or 0) >= MIN_WORDS  # type: ignore[arg-type]
    return several or (are_words and letters.n_unique() >= MIN_WORDS * len(letters))  # SKU-0001 is a code


def _are_names(values: pl.Series) -> bool:
    """Return True for values of a few words."""
    return float(values.str.count_matches(_WORDS).median() or 0) <= MAX_WORDS  # type: ignore[arg-type]


def _shared(present: pl.Series) -> float:
    """Return the share of values that another row has too; 0 for lists in text, in many of which two separators stand or more."""
    are_lists = float((present.str.count_matches(_BETWEEN) >= 2).mean() or 0) >= MIN_SEVERAL  # type: ignore[arg-type]
    return 0.0 if are_lists else float(present.is_duplicated().mean() or 0)  # type: ignore[arg-type]


def _recurs(distinct: pl.Series) -> bool:
    """Return True if the words of distinct values stand in MIN_RECURRING of these or more, on average."""
    words = distinct.drop_nulls().str.split(" ").explode()
    return words.n_unique() * MIN_RECURRING <= len(words)


def _with_spaces(values: pl.Series, separator: str) -> str:
    """Return the separator with the spaces that stand beside it in all values, "" if other ones do, which would be part of what it divides."""
    n = int(values.str.count_matches(separator, literal=True).sum())
    forms = (separator, f"{separator} ", f" {separator} ") if separator.strip() else (separator,)
    for spaced in forms:
        parts = values.str.split(spaced).explode()
        if int(values.str.count_matches(spaced, literal=True).sum()) == n and parts.equals(parts.str.strip_chars()):
            return spaced
    return ""


def _separator(values: pl.Series, side: SideName) -> str:
    """Return the separator of a text column of lists of few distinct values, "" for none."""
    for separator, of_names in SEPARATORS.items():
        several = values.str.contains(separator, literal=True)
        if float(several.mean() or 0) < MIN_SEVERAL:  # type: ignore[arg-type]
            continue
        if separator == " " and (names.names_phrase(values.name) or not _recurs(values.unique())):
            continue
        spaced = _with_spaces(values, separator)
        if not spaced:
            break
        parts = values.str.split(spaced).explode()
        holds_names = side == "item" and not names.names_phrase(values.name) and _are_names(parts)
        holds_names &= not parts.str.contains(r"^[\d.,+-]*$").all()
        most, each = (of_names, MIN_PARTS.get(separator, 5)) if holds_names else (min(of_names, MAX_CATEGORIES), 5)
        if parts.n_unique() * each <= len(parts) and parts.n_unique() <= most:
            return spaced
    return ""
