"""Meaning of the columns of the interactions, guessed from their names and values."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import polars as pl

from twotower.config.toml import TomlValue
from twotower.errors import DataError
from twotower.features.values import missing_count
from twotower.suggestion import names
from twotower.suggestion.text_form import looks_like_seconds
from twotower.suggestion.time_form import TimeForm, is_dated, time_form

MAX_EVENT_TYPES = 20
"""Types of events up to which a column is one of event types."""
IGNORED_EVENTS = {"impression", "impressions", "show", "shown", "expose", "exposure", "display"}
"""Types of events that are no choice of a user."""
REFUSING_EVENTS = {"dislike", "skip", "hide", "reject", "remove", "remove_from_cart", "unlike", "thumbs_down"}
"""Types of events that are a refusal."""


@dataclass
class GuessedColumns:
    """Options of the schema that the interactions decide, each with the reason for it."""

    options: dict[str, TomlValue] = field(default_factory=dict)
    why: dict[str, str] = field(default_factory=dict)
    """Reason by option."""
    notes: list[str] = field(default_factory=list)
    """Columns that are not used, each with the reason."""

    def put(self, option: str, value: TomlValue, why: str) -> None:
        self.options[option], self.why[option] = value, why

    @property
    def named(self) -> set[str]:
        """Columns that the options name."""
        keys = ("user_id", "item_id", "time", "label", "weight", "event")
        return {str(self.options[key]) for key in keys if self.options.get(key)}


def guess_columns(
    frame: pl.DataFrame, given: Mapping[str, TomlValue], sides: Mapping[str, Iterable[str]]
) -> GuessedColumns:
    """Return the options of the schema for a table of interactions. `given` are options that are not guessed, an empty text
    for a column that is not there; `sides` are the columns of the tables of users and items, where there are such.

    Raises DataError if no two columns look like ids, or if times can be read in two ways."""
    found = GuessedColumns()
    for option, value in given.items():
        found.put(option, value, "as given")
    _guess_ids(frame, found, sides)
    for guess in (_guess_time, _guess_event, _guess_label, _guess_weight):
        guess(frame, found)
    left = [name for name in frame.columns if name not in found.named]
    told = {note.split("'")[1] for note in found.notes}
    if left := [name for name in left if name not in told]:
        listed = ", ".join(f"'{name}'" for name in left[:6]) + (", …" if left[6:] else "")
        found.notes.append(f"{listed} of the interactions; a feature with side = 'context' would read it")
    return found


def _free(frame: pl.DataFrame, found: GuessedColumns, test: Callable[[str], bool]) -> list[str]:
    """Return the columns that pass a test of their name and have no meaning yet."""
    return [name for name in frame.columns if name not in found.named and test(name)]


def _guess_ids(frame: pl.DataFrame, found: GuessedColumns, sides: Mapping[str, Iterable[str]]) -> None:
    queries = [name for name in frame.columns if names.names_query(name) and frame[name].dtype == pl.String]
    tests = {"user_id": names.names_user, "item_id": names.names_item}
    for option, test in tests.items():
        if option in found.options:
            continue
        shared = [*dict.fromkeys(name for name in sides.get(option, ()) if name in frame.columns)]
        named = _free(frame, found, test)
        if both := [name for name in shared if name in named] or ([] if named else shared[:1]):
            found.put(option, both[0], "the tables share it")
        elif option == "user_id" and queries and not sides.get(option):
            found.put(option, queries[0], "what was searched for stands for the user")
        elif named:
            found.put(option, min(named, key=lambda name: names.rank(name, option)), "by its name")
    ids = [name for name in frame.columns if name not in found.named and _is_id(frame[name])]
    for option in tests:
        if option not in found.options and ids:
            found.put(option, ids.pop(0), "by its place: the first column of repeated values that is left")
    if missing := [option for option in tests if not found.options.get(option)]:
        raise DataError(
            f"interactions: no column of {' and '.join(missing)} is found (columns: {', '.join(frame.columns[:12])}); name it: "
            f"`overrides` {' '.join(f'schema.{option}=NAME' for option in missing)}"
        )


def _is_id(series: pl.Series) -> bool:
    """Return True for whole numbers or text, without gaps, of which a value stands twice."""
    if not (series.dtype.is_integer() or series.dtype == pl.String) or series.null_count():
        return False
    if names.names_time(series.name) or names.names_label(series.name) or names.names_event(series.name):
        return False
    if series.dtype.is_integer() and looks_like_seconds(series):
        return False
    return 2 <= series.n_unique() < len(series)


def _guess_time(frame: pl.DataFrame, found: GuessedColumns) -> None:
    if "time" in found.options:
        name = str(found.options["time"])
        if name in frame.columns and "time_unit" not in found.options:
            form = time_form(frame[name], str(found.options.get("time_format", "")))
            if form is not None:  # else the check says what the values are not
                _put_form(found, form)
        return
    named = _free(frame, found, names.names_time)
    typed = _free(frame, found, lambda name: is_dated(frame[name]))
    others = _free(frame, found, lambda name: frame[name].n_unique() > 20 and looks_like_seconds(frame[name]))
    for name in dict.fromkeys([*named, *typed, *others]):
        series = frame[name]
        if n := missing_count(series):
            found.notes.append(f"'{name}': {n:,} missing values, so it is no time")
            continue
        if form := time_form(series, str(found.options.get("time_format", ""))):
            found.put("time", name, "by its name" if name in named else "by its values")
            _put_form(found, form)
            return
        found.notes.append(f"'{name}': its values are no times")


def _put_form(found: GuessedColumns, form: TimeForm) -> None:
    if form.unit != "s":
        found.put("time_unit", form.unit, "by its values")
    if form.format and "time_format" not in found.options:
        found.put("time_format", form.format, "by its values")


def _guess_event(frame: pl.DataFrame, found: GuessedColumns) -> None:
    if "event" in found.options or found.options.get("label"):
        return
    for name in _free(frame, found, names.names_event):
        series = frame[name]
        if series.null_count() or not (series.dtype.is_integer() or series.dtype == pl.String):
            continue
        counts = series.cast(pl.String).value_counts(sort=True, name="n")
        if not 2 <= counts.height <= MAX_EVENT_TYPES:
            found.notes.append(f"'{name}': {counts.height:,} types of events, so it is none (2 to {MAX_EVENT_TYPES})")
            continue
        rules: dict[str, TomlValue] = {}
        for word, _ in counts.iter_rows():
            plain = names.plain(word)
            rules[word] = "ignored" if plain in IGNORED_EVENTS else "negative" if plain in REFUSING_EVENTS else 1
        if 1 not in rules.values():
            continue
        found.put("event", name, "by its name")
        found.put("events", rules, "; ".join(f"{word} {n:,}" for word, n in counts.iter_rows()))
        return


def _guess_label(frame: pl.DataFrame, found: GuessedColumns) -> None:
    if "label" in found.options:
        name = str(found.options["label"])
        if name in frame.columns and "positive_above" not in found.options and _is_number(frame[name]):
            found.put("positive_above", _threshold(frame[name]), _why_threshold(frame[name]))
        return
    if found.options.get("event"):
        return
    for name in _free(frame, found, names.names_label):
        series = frame[name]
        if not _is_number(series):
            continue
        if n := missing_count(series):
            found.notes.append(f"'{name}': {n:,} missing values, so it is no label")
            continue
        if series.n_unique() < 2:
            found.notes.append(f"'{name}': one value, so it tells nothing")
            continue
        found.put("label", name, "by its name")
        found.put("positive_above", _threshold(series), _why_threshold(series))
        return


def _is_number(series: pl.Series) -> bool:
    return series.dtype.is_numeric() or series.dtype == pl.Boolean


def _threshold(series: pl.Series) -> float:
    """Return the label above which a row is a positive: of two values the lower, of a scale its middle, rounded up if the scale
    has whole steps above 1."""
    values = series.cast(pl.Float64).unique().sort()
    low, high = float(values[0]), float(values[-1])
    if len(values) == 2:
        return low
    middle = (low + high) / 2
    return float(math.ceil(middle)) if high > 1 else middle


def _why_threshold(series: pl.Series) -> str:
    values = series.cast(pl.Float64).unique().sort()
    if len(values) == 2:
        return f"two values: {values[1]:g} is a positive, {values[0]:g} a negative"
    return f"the middle of {values[0]:g} to {values[-1]:g}"


def _guess_weight(frame: pl.DataFrame, found: GuessedColumns) -> None:
    if "weight" in found.options:
        return
    for name in _free(frame, found, names.names_weight):
        series = frame[name]
        if series.dtype.is_numeric() and not missing_count(series) and float(series.min() or 0) >= 0:  # type: ignore[arg-type]
            found.put("weight", name, "by its name")
            return
