"""Ids that no name of a column tells: the first columns of repeated values."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import polars as pl

from twotower.suggestion import names
from twotower.suggestion.guessed_columns import GuessedColumns, is_distinct
from twotower.suggestion.numbering import counts_occasions
from twotower.suggestion.text_form import looks_like_seconds, looks_like_years
from twotower.suggestion.time_form import has_digits_of_dates, is_dated

HEAD_ROWS = 100_000
"""Rows, the first ones, that tell whether a column numbers orders."""
MIN_ROWS_OF_USER = 2
"""Rows of a user from which its values tell whether a column is one of the users."""
MAX_VALUES_OF_USER = 1.15
"""Values of such users, the mean, up to which a column is one of the users: a name that a few write in two ways."""
MIN_CHOICES = 3
"""Values from which a column of few may be the items where the others are numbers of each user's rows."""
MIN_IDS = 10
"""Distinct values of such ids, if there is one for 100 rows or more."""
NO_ID = -1
"""Number below which no id is, but a hash."""
MIN_AMOUNT = -(2**24)
"""Number below which numbers are hashes, about half of which are below 0."""


def ids_by_place(
    frame: pl.DataFrame, named: Iterable[str], user: str, options: Sequence[str]
) -> tuple[dict[str, str], list[str], dict[str, str]]:
    """Return a column for each option of ids, as far as there are columns that have no meaning yet; the columns of too few values before
    them; and those that number orders or visits, each with the column of its customer. `user` is the column of the users, empty for the first one
    found."""
    known = {*named}
    ids = [name for name in frame.columns if name not in known and _may_be_ids(frame[name])]
    few = [name for name in ids if has_few(frame[name])]
    orders = _numbers_of_orders(frame, ids, [user] if user in frame.columns else [])
    many = [name for name in ids if name not in few and name not in orders]
    if user in frame.columns and "item_id" in options:
        visits = filter(_is_of_one(frame, user), filter(names.names_visit, many))
        orders |= dict.fromkeys(visits, user)
        many = [name for name in many if name not in orders]
    if "user_id" in options:
        many.sort(key=lambda name: name not in orders.values())  # customers are the users
        many.sort(key=names.names_post_code)
    if [*options] == ["user_id"]:  # the items are known, and what has an id beside them is the user
        others = [name for name in known if name in frame.columns]
        many.sort(key=lambda name: not _may_be_user(frame, name, others))
    amounts = _amounts(frame, many, len(options))
    many.sort(key=lambda name: name in amounts)
    user = user or next(iter(many), "")
    places = [*filter(names.names_post_code, many), *amounts]  # items if no other is
    if user in frame.columns and "item_id" in options:
        is_fixed = _is_fixed_by(frame.head(HEAD_ROWS), user)
        fixed = [*filter(is_fixed, many)]  # such as a code of the user
        fixed += [name for name in many if name not in fixed and _is_own(frame, user, name)]  # such as an address
        numbers = [name for name in many if counts_occasions(frame, user, name)]  # such as occasions, the last
        numbers += [
            name for name in many if name not in (user, *numbers) and (name in amounts or is_distinct(frame[name]))
        ]
        fixed = [name for name in fixed if name not in numbers]
        places = [*(name for name in places if name not in (*fixed, *numbers)), *fixed]
        if {user, *numbers} >= {*many}:
            free = [frame[name] for name in frame.columns if name not in known]
            has_gaps = any(s.null_count() and _may_be_ids(s.drop_nulls()) and not has_few(s) for s in free)
            kinds = [s.name for s in free if not has_gaps and _are_items_of_events(s)]
            choices = [name for name in [*(few if numbers else ()), *kinds] if name != user and not is_fixed(name)]
            choices = [name for name in choices if _may_be_choices(frame[name])]
            places += sorted(choices, key=lambda name: -frame[name].n_unique())[:1]
            few = [name for name in few if name not in places]
        places += [name for name in numbers if name not in places]
    found = dict(zip(options, [*(name for name in many if name not in places), *places], strict=False))
    return found, few, orders


def _may_be_user(frame: pl.DataFrame, name: str, others: Iterable[str]) -> bool:
    """Return True for a column that its name says holds ids, and whose values are neither those of each row nor fixed by one of some others."""
    return (
        names.is_id(name)
        and not is_distinct(frame[name])
        and not any(_is_fixed_by(frame, other)(name) for other in others)
    )


def why_id(name: str) -> str:
    """Return the reason for such an id."""
    if names.names_event(name):
        return "by its name, kinds of events"
    return "by its place: the first column of repeated values that is left"


def edge_ends(frame: pl.DataFrame) -> tuple[str, ...]:
    """Return the columns of the two ends of edges that their names tell as a pair: ids both, of not too few values, before which no other
    column may be ids. Empty without such columns."""
    ends = names.ends_of_edges(frame.columns)
    if ends is None or not all(_has_ids(frame[name]) and frame[name].n_unique() >= MIN_IDS for name in ends):
        return ()
    before = frame.columns[: frame.columns.index(ends[0])]
    others = (frame[name] for name in before if name != ends[1])
    return () if any(_may_be_ids(s) and not has_few(s) and not is_distinct(s) for s in others) else ends


def _amounts(frame: pl.DataFrame, many: Sequence[str], wanted: int) -> list[str]:
    """Return those of some columns that say how much, which are ids only if no other column may be. None where too few others are left
    and the first column is none of them, as the order of the columns then tells more."""
    amounts = [name for name in many if _tells_amount(frame[name])]
    others = [name for name in many if name not in amounts]
    return amounts if len(others) >= wanted or wanted == 1 or others[:1] == [*many[:1]] else []


def _tells_amount(series: pl.Series) -> bool:
    """Return True for whole numbers that say how much, by their name or by one below -1, which stands for none. Hashes are none."""
    return series.dtype.is_integer() and (
        names.names_amount(series.name) or MIN_AMOUNT <= int(series.min()) < NO_ID  # type: ignore[arg-type]
    )


def has_few(series: pl.Series) -> bool:
    """Return True for a column of too few values for ids."""
    return series.n_unique() < min(MIN_IDS, len(series) // 100)


def _is_fixed_by(rows: pl.DataFrame, user: str) -> Callable[[str], bool]:
    """Return a test for other columns that have one value for each user, or for nearly each, among users of several rows."""
    rows = rows.filter(pl.len().over(user) >= MIN_ROWS_OF_USER)
    n_users = rows[user].n_unique()
    most = MAX_VALUES_OF_USER * n_users if n_users >= MIN_IDS else n_users
    return lambda name: name != user and 0 < rows.select(name, user).n_unique() <= most


def _is_own(frame: pl.DataFrame, user: str, name: str) -> bool:
    """Return True for another column whose values are of one user each, or nearly each, in most of the rows: no item is shared there."""
    rows = frame.select(user, name).head(HEAD_ROWS) if name != user else pl.DataFrame()
    several = rows.filter(pl.len().over(name) >= MIN_ROWS_OF_USER) if rows.height else rows
    if 2 * several.height <= rows.height or min(several[name].n_unique(), several[user].n_unique()) < MIN_IDS:
        return False
    return _is_fixed_by(several, name)(user)


def _have_one_item(frame: pl.DataFrame, user: str, item: str) -> bool:
    """Return True if nearly every user of several rows has one item, of users who are not few."""
    rows = frame.select(user, item).head(HEAD_ROWS)
    several = rows.filter(pl.len().over(user) >= MIN_ROWS_OF_USER)[user].n_unique()
    return user != item and several >= MIN_IDS and _is_fixed_by(rows, user)(item)


def note_items(frame: pl.DataFrame, found: GuessedColumns) -> None:
    """Note items of which nearly every user has one, so that a model has nothing to tell apart, and such as number rows."""
    user, item = (str(found.options[option]) for option in ("user_id", "item_id"))
    if not {user, item} <= {*frame.columns}:
        return
    if _have_one_item(frame, user, item):
        found.remarks.append(
            f"'{item}' as the item: nearly every user has one item, as of a column that tells of users, and metrics near 1 would tell nothing; "
            "schema.item_id=NAME would name another column"
        )
    elif counts_occasions(frame, user, item):
        found.remarks.append(
            f"'{item}' as the item: it numbers the rows of each user, as occasions and lines of orders do; schema.item_id=NAME would name another "
            "column"
        )


def _may_be_choices(series: pl.Series) -> bool:
    return series.n_unique() >= MIN_CHOICES


def _are_items_of_events(series: pl.Series) -> bool:
    """Return True for kinds of events in words, most of which no list knows as what users do with items, such as the pages of a visit or the
    steps of a case: they are what a user takes where no other column is an item."""
    if not names.names_event(series.name) or series.dtype != pl.String or not _has_ids(series):
        return False
    rules = [names.event_rule(kind) for kind in series.unique()]
    return 2 * rules.count(None) > len(rules)


def _is_of_one(frame: pl.DataFrame, user: str) -> Callable[[str], bool]:
    """Return a test for columns each of whose values is of one user, of several: what no two users share is no item."""
    several = frame[user].n_unique() >= MIN_IDS
    return lambda name: name != user and several and frame.select(name, user).n_unique() == frame[name].n_unique()


def _numbers_of_orders(frame: pl.DataFrame, ids: Sequence[str], others: Sequence[str]) -> dict[str, str]:
    """Return those of some columns of ids that number orders, receipts or baskets of several rows, each with the column of its customer:
    they are named so, and each of their values has one value of all times and of another column, of `ids` or of `others`, which has
    fewer values."""
    rows, found = frame.head(HEAD_ROWS), dict[str, str]()
    times = [name for name in frame.columns if name not in (*ids, *others) and _may_be_times(frame[name])]
    sizes = {name: rows[name].n_unique() for name in (*ids, *others)}
    for name in filter(names.names_order, ids):

        def decides(other: str, name: str = name) -> bool:
            return rows.select(name, other).n_unique() == sizes[name]

        fewer = (o for o in sizes if o != name and 1 < sizes[o] < sizes[name])
        if (
            sizes[name] < rows.height
            and times
            and all(map(decides, times))
            and (of := next(filter(decides, fewer), None))
        ):
            found[name] = of
    return found


def _may_be_times(series: pl.Series) -> bool:
    is_number = series.dtype.is_integer() and looks_like_seconds(series)
    return names.names_time(series.name) or is_number or is_dated(series) or has_digits_of_dates(series)


def are_several(frame: pl.DataFrame, named: Iterable[str]) -> bool:
    """Return True if several columns that have no meaning yet may be ids."""
    known = {*named}
    return sum(name not in known and _may_be_ids(frame[name]) for name in frame.columns) > 1


def too_few(frame: pl.DataFrame, few: Iterable[str]) -> str:
    """Return why columns are no ids; empty without one."""
    told = ", ".join(f"'{name}' has {frame[name].n_unique()} values" for name in few)
    return f"{told}, too few for ids that no name tells" if told else ""


def _may_be_ids(series: pl.Series) -> bool:
    """Return True for a column of ids by its values whose name tells no other meaning."""
    if names.names_time(series.name) or names.names_label(series.name) or names.names_event(series.name):
        return False
    if series.dtype.is_integer() and looks_like_seconds(series):
        return False
    if names.names_part_of_time(series.name) and series.dtype.is_integer():
        return False
    if names.names_year(series.name) and looks_like_years(series):
        return False
    return _has_ids(series)


def _has_ids(series: pl.Series) -> bool:
    """Return True for whole numbers or text, without gaps, no dates, of several values, one of which stands twice."""
    if not (series.dtype.is_integer() or series.dtype == pl.String) or series.null_count():
        return False
    return 2 <= series.n_unique() < len(series) and not (is_dated(series) or has_digits_of_dates(series))
