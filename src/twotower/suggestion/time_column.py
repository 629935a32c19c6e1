"""Time of the interactions, guessed from the names and values of their columns."""

from __future__ import annotations

import polars as pl

from twotower.features.values import missing_count
from twotower.suggestion import names
from twotower.suggestion.guessed_columns import GuessedColumns, free, put_first, rows_vary
from twotower.suggestion.numbering import may_order
from twotower.suggestion.text_form import looks_like_seconds, odd_times
from twotower.suggestion.time_form import TimeForm, is_dated, refuse_orders, time_form


def guess_time(frame: pl.DataFrame, found: GuessedColumns) -> None:
    if "time" in found.options:
        name = str(found.options["time"])
        if name in frame.columns and "time_unit" not in found.options:
            form = time_form(frame[name], str(found.options.get("time_format", "")))
            if form is not None:
                _put_form(found, form, frame[name])
            elif "time_format" not in found.options:
                refuse_orders(frame[name])  # else the check says what the values are not
        return
    named = free(frame, found, names.names_time)
    typed = free(frame, found, lambda name: is_dated(frame[name]))
    others = free(frame, found, lambda name: frame[name].n_unique() > 20 and looks_like_seconds(frame[name]))
    forms, incomplete = dict[str, TimeForm](), dict[str, int]()
    for name in rows_vary(frame, found, "time", dict.fromkeys([*named, *typed, *others])):
        series = frame[name]
        if n := missing_count(series):
            incomplete[name] = n
        elif form := time_form(series, str(found.options.get("time_format", "")), strict=not forms):
            forms[name] = form
        else:
            found.notes.append(f"'{name}': its values are no times")
    for name in () if forms else named:
        refuse_orders(frame[name])
    for name, n in incomplete.items():
        text = f"'{name}': {n:,} of {len(frame):,} values are missing, so it is no time"
        if forms or 2 * n > len(frame):
            found.notes.append(text)
        else:  # the recipe depends on it
            found.remarks.append(
                f"{text} and tells no order; fill these values or drop the rows, and call suggest again"
            )
    if forms:
        ranked = sorted(forms, key=lambda name: forms[name].unit == "order")
        why = {name: "by its name" if name in named else "by its values" for name in ranked}
        put_first(found, "time", ranked, why, frame)
        _put_form(found, forms[ranked[0]], frame[ranked[0]])
    elif not incomplete:
        _guess_places(frame, found)


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


def _put_form(found: GuessedColumns, form: TimeForm, series: pl.Series) -> None:
    if form.unit != "s":
        found.put("time_unit", form.unit, "by its values")
    if form.unit == "order" and (n := odd_times(series)):
        found.remarks.append(
            f"'{series.name}': {n:,} of {len(series):,} values are no times from 1990 to tomorrow and the others are, so all are read as "
            "an order alone; drop these rows for times"
        )
    if form.format and "time_format" not in found.options:
        found.put("time_format", form.format, "by its values")
