"""Meaning of the columns of the interactions, guessed from their names and values."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import polars as pl

from twotower.config.toml import TomlValue
from twotower.data.tables import lacks_id
from twotower.errors import DataError
from twotower.features.values import missing_count
from twotower.suggestion import names
from twotower.suggestion.guessed_columns import MIN_ROWS, GuessedColumns, free, is_distinct, is_of, put_first, rows_vary
from twotower.suggestion.ids_by_place import are_several, edge_ends, has_few, ids_by_place, note_items, too_few, why_id
from twotower.suggestion.numbering import counts_occasions, note_orders, notes_of_row_numbers, row_numbers
from twotower.suggestion.text_form import (
    fault_of_numbers,
    looks_like_scale,
    words_among_numbers,
)
from twotower.suggestion.thresholds import threshold, why_log_scale, why_threshold
from twotower.suggestion.time_column import guess_time

MAX_EVENT_TYPES = 20
"""Types of events up to which a column is one of event types."""
NONE = (
    "", "na", "n/a", "#n/a", "nan", "none", "null", "(null)", "<null>", "nil", "-", "unknown", "undefined", "\\n", "anonymous", "guest",
)  # fmt: skip
"""Words for a missing value, in lower case."""
LARGE, TIMES_NEXT = 0.05, 10
"""Share of the rows, and number of times those of the next user, from which one user may stand for all without an id."""
ONE_ROW = 0.95
"""Number of users, in rows, from which users have one row."""
MANY_LABELS = 20
"""Labels from which a column may count something."""
MIN_STEPS = 5
"""Steps from which numbers of a scale may be ratings whatever their name."""
OUTCOMES = (
    {"0", "1"}, {"-1", "1"}, {"false", "true"}, {"no", "yes"}, {"n", "y"}, {"dislike", "like"}, {"disliked", "liked"},
    {"down", "up"}, {"negative", "positive"}, {"bad", "good"},
)  # fmt: skip
"""Pairs of values, in lower case, that tell what came of an interaction."""


def guess_columns(
    frame: pl.DataFrame,
    given: Mapping[str, TomlValue],
    sides: Mapping[str, Iterable[str]],
    keys: Mapping[str, Collection[str]] | None = None,
) -> GuessedColumns:
    """Return the options of the schema for a table of interactions. `given` are options that are not guessed, an empty text
    for a column that is not there; `sides` are the columns of the tables of users and items, where there are such, and `keys` those
    of them that are distinct in their table. Raises DataError if no two columns look like ids, or if times can be read in two ways."""
    found = GuessedColumns()
    reserved = [name for name in frame.columns if name.startswith("__")]
    found.notes += [
        f"'{name}': names that begin with '__' are the package's own; rename the column if it is to be read"
        for name in reserved
    ]
    numbers = row_numbers(frame, [*reserved, *map(str, given.values())])
    found.notes += notes_of_row_numbers(numbers, "interactions")
    frame = frame.drop(*reserved, *numbers)
    for option, value in given.items():
        found.put(option, value, "as given")
    try:
        _guess_ids(frame, found, sides, keys or {})
    except DataError as e:
        if not numbers:
            raise
        raise DataError(
            f"{e} (left out, as they number the rows: {', '.join(map(repr, numbers))}; name one if it holds ids)"
        ) from None
    if given.get("missing") == "drop":
        ids = [key for option in ("user_id", "item_id") if (key := str(found.options[option])) in frame.columns]
        frame = frame.filter(*(~lacks_id(frame[key]) for key in ids))
    _note_ids_of_none(frame, found)
    _note_large_user(frame, found)
    is_named = names.names_user(str(found.options["user_id"]))
    if "user_id" not in given and not (is_named and sides.get("user_id")):  # of whom a table tells something
        _note_users_of_one_row(frame, found)
    if "item_id" not in given:
        note_items(frame, found)
    for guess in (guess_time, _guess_event, _guess_label, _guess_weight, _note_weights, _note_outcomes, _note_returns):
        guess(frame, found)
    if not found.options.get("time"):
        note_orders(frame, str(found.options["user_id"]), free(frame, found, bool), found.notes)
    return found


def _guess_ids(
    frame: pl.DataFrame,
    found: GuessedColumns,
    sides: Mapping[str, Iterable[str]],
    keys: Mapping[str, Collection[str]],
) -> None:
    queries = [name for name in frame.columns if names.names_query(name) and frame[name].dtype == pl.String]
    tests, last = {"user_id": names.names_user, "item_id": names.names_item}, set[str]()
    for option, test in tests.items():
        if option in found.options:
            continue
        shared = [*dict.fromkeys(sides.get(option, ()))]
        shared = [name for name in shared if name in frame.columns and name not in found.named]
        shared.sort(key=lambda name: (name not in keys.get(option, ()), is_distinct(frame[name])))
        named = [n for n in free(frame, found, test) if not (names.names_visit(n) and has_few(frame[n]))]
        if both := [name for name in shared if name in named] or ([] if named else shared[:1]):
            found.put(option, both[0], "the tables share it")
        elif option == "user_id" and queries and not sides.get(option):
            found.put(option, queries[0], "what was searched for stands for the user")
        elif named:
            if option == "item_id":
                user = str(found.options.get("user_id", ""))
                last = {name for name in named if is_distinct(frame[name]) or counts_occasions(frame, user, name)}
            named.sort(key=lambda name: (name in last, *names.rank(name, option)))
            put_first(found, option, named, dict.fromkeys(named, "by its name"), frame)
    for option, name in zip(tests, () if {*tests} & {*found.options} else edge_ends(frame), strict=False):
        found.put(option, name, "by its name, as one end of edges")
    few = list[str]()
    if missing := [option for option in tests if option not in found.options]:
        few = _put_ids_by_place(frame, found, missing)
        if "user_id" not in found.options and (sessions := free(frame, found, names.names_user)):
            found.put("user_id", sessions[0], "by its name, and no other column may be the user")
    if missing := [option for option in tests if not found.options.get(option)]:
        why = "".join(
            f"; {told}" for told in (too_few(frame, few), *(n for n in found.notes if "is no item" in n)) if told
        )
        raise DataError(
            f"interactions: no column of {' and '.join(missing)} is found (columns: {', '.join(frame.columns[:12])}{why}); name it: "
            f"`overrides` {' '.join(f'schema.{option}=NAME' for option in missing)}"
        )


def _put_ids_by_place(frame: pl.DataFrame, found: GuessedColumns, options: list[str]) -> list[str]:
    """Put the first columns of repeated values, and tell where others might be meant. Return those of too few values."""
    several = are_several(frame, found.named)
    put, few, orders = ids_by_place(frame, found.named, str(found.options.get("user_id", "")), options)
    found.notes += [
        f"'{name}': each of its values has one '{of}', so it numbers orders or visits, and is no item"
        for name, of in orders.items()
    ]
    for option, name in put.items():
        found.put(option, name, why_id(name))
    if len(put) == len(options) and {*frame.columns} - found.named:
        taken = " and ".join(f"'{name}' as the {option[:4]}" for option, name in put.items())
        setting = " and ".join(f"schema.{option}=NAME" for option in options)
        alone = "" if several else "no other column may be one"
        by_place = "by the place alone, because no name of a column tells it"
        why = "; ".join(filter(None, (by_place, alone, too_few(frame, few))))
        found.remarks.append(
            f"{taken}: {why}; {'overrides' if options[1:] else 'an override'} such as {setting} would correct it"
        )
    return few


def _note_ids_of_none(frame: pl.DataFrame, found: GuessedColumns) -> None:
    """Note ids that are words for a missing value."""
    for option in ("user_id", "item_id"):
        name = str(found.options[option])
        if name not in frame.columns or frame[name].dtype != pl.String:
            continue
        none = frame[name].filter(frame[name].str.strip_chars().str.to_lowercase().is_in(NONE))
        if len(none):
            found.remarks.append(
                f"'{name}': {len(none):,} rows have the id {none[0]!r}, which is read as an id like any other; drop these rows if it "
                "says that there is none"
            )


def _guess_event(frame: pl.DataFrame, found: GuessedColumns) -> None:
    if "event" in found.options or found.options.get("label"):
        return
    for name in rows_vary(frame, found, "event", free(frame, found, names.names_event)):
        series = frame[name]
        if series.null_count() or not (series.dtype.is_integer() or series.dtype == pl.String):
            continue
        counts = series.cast(pl.String).value_counts(sort=True, name="n")
        if not 2 <= counts.height <= MAX_EVENT_TYPES:
            found.notes.append(f"'{name}': {counts.height:,} types of events, so it is none (2 to {MAX_EVENT_TYPES})")
            continue
        rules: dict[str, TomlValue] = {}
        unknown = []
        for word, _ in counts.iter_rows():
            rule = names.event_rule(word)
            rules[word] = 1 if rule is None else rule
            unknown += [f"'{word}'"] if rule is None else []
        if 1 not in rules.values():
            continue
        if {*rules.values()} == {1} and (labels := _labels(frame, found, [])):
            found.notes.append(f"'{name}': all its types weigh 1, and '{labels[0]}' is a label")
            continue
        found.put("event", name, "by its name")
        why = "; ".join(f"{word} {n:,}" for word, n in counts.iter_rows())
        yours = f". No list knows {', '.join(unknown)}: weights of these are yours to set" if unknown else ""
        found.put("events", rules, why + yours)
        ignored = {word: n for word, n in counts.iter_rows() if rules[word] == "ignored"}
        if 2 * sum(ignored.values()) > frame.height or {*map(names.plain, ignored)} & {"show", "display"}:
            listed = ", ".join(f"{word} {n:,}" for word, n in ignored.items())
            found.remarks.append(
                f"'{name}': rows that were only shown are ignored ({listed}); schema.events gives them a weight if users chose them"
            )
        return


def _guess_label(frame: pl.DataFrame, found: GuessedColumns) -> None:
    if "label" in found.options:
        name = str(found.options["label"])
        if name in frame.columns and "positive_above" not in found.options and _is_number(frame[name]):
            found.put("positive_above", threshold(frame[name]), why_threshold(frame[name]))
            if names.names_refusal(name):
                found.remarks.append(
                    f"'{name}' as the label: by its name a row above {threshold(frame[name]):g} is what users refused, and is read as what they "
                    "liked; give a column of the opposite"
                )
        return
    if found.options.get("event"):
        return
    for name in free(frame, found, names.names_label):
        if frame[name].dtype != pl.String:
            continue
        if fault := fault_of_numbers(frame[name]):
            found.notes.append(f"'{name}': {fault} for a label")
        elif (odd := words_among_numbers(frame[name])) is not None:
            found.notes.append(
                f"'{name}': {len(odd):,} of {frame.height:,} values are no numbers ({odd[0]!r}), so it is no label; give "
                "numbers in their place, or drop the rows"
            )
        elif 2 < frame[name].drop_nulls().n_unique() <= MAX_EVENT_TYPES and _tells_rows(frame, found, name):
            words = frame[name].drop_nulls().unique().sort().to_list()
            found.notes.append(
                f"'{name}' is a label in words ({', '.join(map(repr, words[:4]))}{', …' if words[4:] else ''}), which is not read; "
                f"schema.event={name} reads it, with what each word means in schema.events: a weight, 'negative' or 'ignored'"
            )
    if labels := _labels(frame, found, found.notes):
        put_first(found, "label", labels, dict.fromkeys(labels, "by its name"), frame)
        series = frame[labels[0]]
        found.put("positive_above", threshold(series), why_threshold(series))
        if series.n_unique() > MANY_LABELS:
            found.remarks.append(
                f"'{labels[0]}' as the label: {series.n_unique():,} values, those above {threshold(series):g} are positives; set "
                "schema.label = '' if it counts something"
            )


def _tells_rows(frame: pl.DataFrame, found: GuessedColumns, name: str) -> bool:
    """Return True for a column that tells neither of users nor of items, each of which has several values."""
    return not any(is_of(frame, found, option, name) for option in ("user_id", "item_id"))


def _labels(frame: pl.DataFrame, found: GuessedColumns, notes: list[str]) -> list[str]:
    """Return the columns that may be labels, the best first, and note in `notes` what is none."""
    columns = free(frame, found, lambda name: names.names_label(name) and _is_number(frame[name]))
    usable = []
    for name in columns:
        series = frame[name]
        if names.names_refusal(name):
            continue  # noted as an outcome, and no label
        if n := missing_count(series):
            notes.append(f"'{name}': {n:,} missing values, so it is no label")
        elif series.n_unique() < 2:
            notes.append(f"'{name}': one value, so it tells nothing")
        elif is_of(frame, found, "item_id", name):
            notes.append(f"'{name}': each item has one value, so it tells of items, and is no label")
        elif series.n_unique() > MANY_LABELS and is_of(frame, found, "user_id", name):
            notes.append(f"'{name}': each user has one value, so it tells of users, and is no label")
        else:
            usable.append(name)
    return sorted(usable, key=lambda name: names.rank(name, "label"))


def _note_outcomes(frame: pl.DataFrame, found: GuessedColumns) -> None:
    """Note columns of two values that tell what came of an interaction."""
    told = {note.split("'")[1] for note in found.notes}
    for name in free(frame, found, lambda name: name not in told):
        series = frame[name]
        if not (_is_number(series) or series.dtype == pl.String):
            continue
        present = series.drop_nulls()
        if present.n_unique() >= MIN_STEPS and not series.null_count() and looks_like_scale(series):
            found.notes += _note_scale(frame, found, series)
        if present.n_unique() != 2 or any(is_of(frame, found, option, name) for option in ("user_id", "item_id")):
            continue
        values = [f"{v:g}" if isinstance(v, float) else str(v) for v in present.unique().sort()]
        if names.names_refusal(name):
            found.notes.append(
                f"'{name}' tells by its name what users refused, so its larger value is no positive; schema.label would read a column of the "
                "opposite"
            )
        elif names.names_outcome(name) or {v.strip().lower() for v in values} in OUTCOMES:
            ways = (
                f"schema.label={name}"
                if _is_number(series)
                else f"schema.event={name}, and schema.events: 'negative' for one of {' and '.join(map(repr, values))}, or "
                "schema.label to a column of 0 and 1"
            )
            n = series.null_count()
            found.notes.append(
                f"'{name}' looks like a label, but {n:,} of {len(series):,} values are missing; fill them, or drop the rows, and set {ways}"
                if n
                else f"'{name}' looks like a label; set {ways}"
            )


def _note_scale(frame: pl.DataFrame, found: GuessedColumns, series: pl.Series) -> list[str]:
    """Return a note about numbers of a scale whose name does not say that they are ratings."""
    if (
        found.options.get("label")
        or found.options.get("event")
        or any(is_of(frame, found, option, series.name) for option in ("user_id", "item_id"))
    ):
        return []
    low, high = float(series.min()), float(series.max())  # type: ignore[arg-type]
    return [
        f"'{series.name}' has {series.n_unique()} steps from {low:g} to {high:g}; "
        f"schema.label={series.name} would read ratings"
    ]


def _note_large_user(frame: pl.DataFrame, found: GuessedColumns) -> None:
    """Note a user with so many rows that it may stand for all whose id is not known."""
    name = str(found.options["user_id"])
    if name not in frame.columns or frame.height < MIN_ROWS:
        return
    first, *others = frame[name].drop_nulls().alias("id").value_counts(sort=True, name="n").head(2).rows() or [()]
    if not others or (frame[name].dtype == pl.String and str(first[0]).strip().lower() in NONE):
        return  # told as such
    if first[1] >= max(LARGE * frame.height, TIMES_NEXT * others[0][1]):
        found.remarks.append(
            f"'{name}': {first[1]:,} rows are of the one user {first[0]!r}, and the next has {others[0][1]:,}; drop these rows if it stands for "
            "users who are not known"
        )


def _note_users_of_one_row(frame: pl.DataFrame, found: GuessedColumns) -> None:
    """Note users nearly all of whom have one row."""
    name = str(found.options["user_id"])
    if name not in frame.columns or frame.height < MIN_ROWS or names.names_query(name):
        return
    if (n := frame[name].n_unique()) > ONE_ROW * frame.height:
        found.remarks.append(
            f"'{name}' as the user: {frame.height:,} rows are of {n:,} users, so there is hardly a history to learn from; it may number rows or orders, and "
            "schema.user_id=NAME would name another column"
        )


def _note_returns(frame: pl.DataFrame, found: GuessedColumns) -> None:
    """Note numbers below 0 of what was bought, if no label or event tells what users took."""
    if found.options.get("label") or found.options.get("event"):
        return
    for name in free(frame, found, names.names_quantity):
        if frame[name].dtype.is_numeric() and (n := int((frame[name] < 0).sum())):
            found.remarks.append(
                f"'{name}': {n:,} of {frame.height:,} values are below 0, as of returns, and these rows count as taken; drop them, or give a label"
            )


def _is_number(series: pl.Series) -> bool:
    return series.dtype.is_numeric() or series.dtype == pl.Boolean


def _guess_weight(frame: pl.DataFrame, found: GuessedColumns) -> None:
    if "weight" not in found.options:
        for name in free(frame, found, names.names_weight):
            if side := next((s for s in ("item", "user") if is_of(frame, found, f"{s}_id", name)), ""):
                found.notes.append(f"'{name}': each {side} has one value, so it tells of {side}s, and is no weight")
            elif _may_weigh(frame[name]):
                found.put("weight", name, "by its name")
                break
    weight = str(found.options.get("weight", ""))
    is_open = weight in frame.columns and "weight_scale" not in found.options
    if is_open and _may_weigh(frame[weight]) and (why := why_log_scale(frame[weight])):
        found.put("weight_scale", "log", why)


def _note_weights(frame: pl.DataFrame, found: GuessedColumns) -> None:
    """Note numbers that may tell how much a row counts, such as plays of a song, if no column is the weight."""
    for name in [] if found.options.get("weight") else free(frame, found, names.names_count):
        is_of_side = any(is_of(frame, found, option, name) for option in ("user_id", "item_id"))
        if _may_weigh(frame[name]) and frame[name].n_unique() >= MIN_STEPS and not is_of_side:
            found.notes.append(f"'{name}' may tell how much a row counts; schema.weight={name} would weigh rows by it")


def _may_weigh(series: pl.Series) -> bool:
    """Return True for numbers without gaps, none below 0."""
    return series.dtype.is_numeric() and not missing_count(series) and float(series.min() or 0) >= 0  # type: ignore[arg-type]
