"""Time of the interactions, guessed from the names and values of their columns."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import polars as pl

from twotower.data.times import MICROSECONDS
from twotower.errors import DataError
from twotower.features.values import missing_count
from twotower.suggestion import names
from twotower.suggestion.guessed_columns import GuessedColumns, free, is_of, put_first, rows_vary
from twotower.suggestion.numbering import MIN_NUMBERED, may_order
from twotower.suggestion.text_form import looks_like_seconds, looks_like_years
from twotower.suggestion.time_form import (
    MAX_ODD,
    TimeForm,
    faults_of_times,
    is_dated,
    moments,
    problem,
    refuse_orders,
    time_form,
)

DAY = 86_400
"""Seconds of a day."""
COMPARED_ROWS = 2_000
"""Rows by which times are compared."""
MIN_AGREEING = 0.95
"""Share of rows of the same day from which two columns are one time."""
MIN_VARYING = 0.5
"""Share of the users, and of the items, of several rows that have several years if these are times of the rows."""
CLOCK = r"^\s*\d{1,2}:\d\d(:\d\d([.,]\d+)?)?\s*([AaPp]\.?[Mm]\.?)?\s*$"
"""A time of day."""


def guess_time(frame: pl.DataFrame, found: GuessedColumns) -> None:
    """Put the column of the time, or numbers that order the rows of each user, and note the columns that are none. Raises DataError for
    times that can be read in two ways."""
    given, drops = str(found.options.get("time_format", "")), found.options.get("bad_times") == "drop"
    if "time" in found.options:
        name = str(found.options["time"])
        if name in frame.columns and "time_unit" not in found.options:
            form = time_form(frame[name], given, drops=drops)
            if not drops and (fault := _broken(frame[name], form, given)) and fault.mend:
                _refuse(frame[name], fault)
            if form is not None:
                _put_form(found, form)
            elif "time_format" not in found.options:
                refuse_orders(frame[name])  # else the check says what the values are not
        return
    is_order = found.options.get("time_unit") == "order"
    named = [name for name in free(frame, found, names.names_time) if name]
    typed = free(frame, found, lambda name: bool(name) and is_dated(frame[name]))
    others = free(
        frame, found, lambda name: bool(name) and frame[name].n_unique() > 20 and looks_like_seconds(frame[name])
    )
    forms, broken, unknown = dict[str, TimeForm](), dict[str, _Fault](), dict[str, _Fault]()
    for name in rows_vary(frame, found, "time", dict.fromkeys([*named, *typed, *others])):
        series = frame[name]
        has_values = missing_count(series) <= (len(series) / 2 if drops else 0)
        form = time_form(series, given, strict=not forms, drops=drops) if has_values else None
        if not drops and not is_order and (why := _broken(series, form, given)):
            broken[name] = why
        elif form is None:
            unknown[name] = _unknown(series, given)
        elif form.unit == "order" and _is_duration(frame, name):
            unknown[name] = _Fault(
                "by its name a duration or a part of a date",
                f"set schema.time={name} and schema.time_unit=order if it orders the rows",
            )
        else:
            forms[name] = form
    for name in () if forms else named:
        refuse_orders(frame[name])
    of_user = {name for name in forms if is_of(frame, found, "user_id", name)}
    if not broken and of_user == {*forms}:
        _guess_places(frame, found)
    if not forms and not broken and not found.options.get("time"):
        _guess_years(frame, found)
    if not forms and not broken and not found.options.get("time"):
        _guess_elapsed(frame, found)
    if forms and not found.options.get("time"):
        _put_best(frame, found, forms, of_user, named)
    is_sure = found.is_numbered or any(
        form.unit != "order" and name not in of_user and not names.names_other_time(name)
        for name, form in forms.items()
    )
    for name, fault in () if is_sure else broken.items():
        if fault.refused and not names.names_other_time(name) and not is_of(frame, found, "user_id", name):
            _refuse(frame[name], fault)
    for name, fault in (broken | unknown).items():
        if is_sure or not fault.mend or (name in unknown and forms):
            found.notes.append(f"'{name}': {fault.what}")
        else:  # the recipe depends on it
            tells = " and tells no order" if name in broken else ""
            found.remarks.append(f"'{name}': {fault.what}{tells}; {fault.mend}, and call suggest again")


class _Fault(NamedTuple):
    """Reason why a column is no time, and what to do if it is to be one. Empty: nothing."""

    what: str
    mend: str = ""
    refused: bool = False
    """True for times of which a few are bad."""


def _broken(series: pl.Series, form: TimeForm | None, given: str) -> _Fault | None:
    """Return which values of a column of times are missing or bad, by a format if one is `given`; None for a column of
    the form of times, or of no times. Where most are missing nothing is to be done."""
    if form is not None and form.unit != "order":
        return None
    if 2 * (n := missing_count(series)) > len(series):
        return _Fault(f"{n:,} of {len(series):,} values are missing, so it is no time")
    if times := faults_of_times(series, given):
        few = times.bad > times.missing or not _lacks_many(series)
        mend = f"set schema.time={series.name} and schema.bad_times=drop to leave these rows out"
        return _Fault(times.faults(), mend, refused=few)
    return _Fault(f"{n:,} of {len(series):,} values are missing, so it is no time") if n else None


def _refuse(series: pl.Series, fault: _Fault) -> None:
    """Raise DataError for a column of times of which a few are bad."""
    is_whole = series.dtype.is_numeric() and not missing_count(series)
    order = "set schema.time_unit = 'order' if the numbers are an order alone, " if is_whole else ""
    raise DataError(
        f"interactions: time '{series.name}': {fault.what}; set schema.bad_times = 'drop' to leave those rows out, "
        f"{order}or set schema.time = '' if the column holds no times"
    )


def _unknown(series: pl.Series, given: str) -> _Fault:
    """Return why a column is none of times, of a format if one is given, and what to do where another may read it."""
    if series.dtype != pl.String or float(series.str.contains(r"\d").mean() or 0) < MIN_AGREEING:  # type: ignore[arg-type]
        return _Fault("its values are no times")
    if not given and float(series.str.contains(CLOCK).mean() or 0) >= MIN_AGREEING:  # type: ignore[arg-type]
        return _Fault(
            "times of day without a date; one column of both, such as 2023-01-31 12:30:15, tells the order within a day"
        )
    return _Fault(problem(series, given), f"beside it set schema.time={series.name}")


def _is_duration(frame: pl.DataFrame, name: str) -> bool:
    """Return True for numbers that are no order by their name: how long something takes, an hour of the day, a day beside its month."""
    of_month = names.names_day(name) and any(
        names.names_part_of_date(other) and frame[other].n_unique() > 1 for other in frame.columns
    )
    in_month = of_month and bool(frame[name].is_between(1, 31).all())
    return names.names_duration(name) or in_month


def _put_best(
    frame: pl.DataFrame, found: GuessedColumns, forms: dict[str, TimeForm], of_user: set[str], named: list[str]
) -> None:
    """Put the best of some columns as the time: one of times, that varies for a user, by its name one of the row, and finer than a day
    if others are."""
    places = np.linspace(0, frame.height - 1, min(frame.height, COMPARED_ROWS)).astype(int)
    real = [name for name, form in forms.items() if form.unit != "order"]
    times = {name: moments(frame[name].gather(places), forms[name]) // MICROSECONDS for name in real}
    whole = {name: bool((times[name] % DAY == 0).all()) for name in real}

    def agree(one: str, other: str) -> bool:
        """Return True if nearly all rows have the same day in both, or the next, as zones differ."""
        apart = (times[one] // DAY - times[other] // DAY).abs()
        return float((apart <= 1).mean() or 0) >= MIN_AGREEING  # type: ignore[arg-type]

    coarse = {name for name in real if whole[name] and any(not whole[o] and agree(name, o) for o in real)}
    keys = {
        name: (
            form.unit == "order",
            name in of_user,
            _lacks_many(frame[name]) or names.names_other_time(name),
            name in coarse,
        )
        for name, form in forms.items()
    }
    ranked = sorted(forms, key=lambda name: keys[name])
    best = ranked[0]
    why = {name: "by its name" if name in named else "by its values" for name in ranked}
    put_first(found, "time", ranked, why, frame)
    _put_form(found, forms[best])
    if forms[best].unit != "order" and best in of_user:
        found.remarks.append(
            f"'{best}' as the time: each user has one value, so rows of a user have no order; schema.time=NAME would read another column"
        )
    alike = [name for name in ranked[1:] if keys[name] == keys[best] and name in times and name in named]
    rivals = [name for name in alike if whole[name] <= whole[best] and not agree(best, name)]
    if best in times and rivals:
        found.remarks.append(f"'{best}' as the time: '{rivals[0]}' is another; schema.time={rivals[0]} would read it")
    if forms[best].unit == "order" and not names.is_time(best):
        found.remarks.append(
            f"'{best}': its numbers are no times from 1990 to tomorrow, and are read as an order by its name alone; set "
            "schema.time = '' if it is none"
        )


def _lacks_many(series: pl.Series) -> bool:
    return missing_count(series) > MAX_ODD * len(series)


def _guess_places(frame: pl.DataFrame, found: GuessedColumns) -> None:
    """Put numbers of the rows of each user as the time of a log that has no other."""
    user = str(found.options["user_id"])
    means_other = (names.names_label, names.names_weight, names.names_event)
    unnamed = free(frame, found, lambda name: not any(test(name) for test in means_other))
    if places := [name for name in unnamed if may_order(frame, user, name)]:
        found.is_numbered = True
        first = int(frame[places[0]].min())  # type: ignore[arg-type]
        why = f"it numbers the rows of each user from {first} on, which is read as oldest first"
        put_first(found, "time", places, dict.fromkeys(places, why), frame)
        found.put("time_unit", "order", "by its values")


def _guess_years(frame: pl.DataFrame, found: GuessedColumns) -> None:
    """Put years that vary for users and items as the time of a log that has no other: they order the rows of a user, but for those of one year."""
    years = [
        name
        for name in free(frame, found, names.names_year)
        if looks_like_years(frame[name])
        and not missing_count(frame[name])
        and all(_varies(frame, str(found.options[option]), name) for option in ("user_id", "item_id"))
    ]
    if years and (
        parts := [name for name in frame.columns if names.names_part_of_date(name) and not names.names_year(name)]
    ):
        found.remarks.append(
            f"'{years[0]}' beside '{parts[0]}': no part of a date is read as a time; join them to one column of dates, and call suggest again"
        )
    elif years:
        put_first(found, "time", years, dict.fromkeys(years, "by its name, of years"), frame)
        found.put("time_unit", "order", "by its values")
        found.remarks.append(
            f"'{years[0]}' as the time: its years order the rows of a user, but for those of one year; set schema.time = '' if they are of the items"
        )


def _guess_elapsed(frame: pl.DataFrame, found: GuessedColumns) -> None:
    """Put numbers that never fall among the rows of a user, such as days since the first visit, as the time of a log that has no other."""
    user = str(found.options["user_id"])
    if user not in frame.columns:
        return
    numbers = free(frame, found, lambda name: names.names_elapsed(name) and frame[name].dtype.is_numeric())
    rising = [name for name in numbers if not missing_count(frame[name]) and _never_falls(frame, user, name)]
    rising = rows_vary(frame, found, "time", rising)  # sorted by the age of the items, no user's row falls
    if rising and found.options.get("time") is None:
        found.is_numbered = True
        why = "its numbers never fall among the rows of a user, which is read as oldest first"
        put_first(found, "time", rising, dict.fromkeys(rising, why), frame)
        found.put("time_unit", "order", "by its values")


def _never_falls(frame: pl.DataFrame, user: str, name: str) -> bool:
    """Return True for numbers that never fall from one row of a user to the next, vary for most users, and rise often enough."""
    steps = frame.select(step=pl.col(name).cast(pl.Float64).diff().over(user)).drop_nulls()["step"]
    return int((steps > 0).sum()) >= MIN_NUMBERED and not (steps < 0).any() and _varies(frame, user, name)


def _varies(frame: pl.DataFrame, key: str, name: str) -> bool:
    """Return True if a column has several values for most ids of several rows."""
    if key not in frame.columns:
        return False
    each = frame.group_by(key).agg(rows=pl.len(), values=pl.col(name).n_unique()).filter(pl.col("rows") > 1)
    return len(each) > 0 and int((each["values"] > 1).sum()) >= MIN_VARYING * len(each)


def _put_form(found: GuessedColumns, form: TimeForm) -> None:
    if form.unit != "s":
        found.put("time_unit", form.unit, "by its values")
    if form.format and "time_format" not in found.options:
        found.put("time_format", form.format, "by its values")
