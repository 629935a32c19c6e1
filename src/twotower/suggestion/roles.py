"""Roles of the columns of a log by a few standard names and types, and the question where two readings are possible."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, TypedDict

import polars as pl

from twotower.config.toml import TomlValue
from twotower.data.evidence import measure_constancy
from twotower.data.reading.times import Times, formats_of, plausible_range
from twotower.errors import DataError, OpenRoles, did_you_mean
from twotower.features.schema import Schema
from twotower.features.values import missing_count


class RoleColumns(TypedDict, total=False):
    """Columns of the log by role. An empty name: no column has the role. None: the column is found by its name."""

    user: str | None
    item: str | None
    query: str | None
    time: str | None
    label: str | None
    event: str | None
    weight: str | None
    session: str | None
    title: str | None


OPTION_OF = {
    "query": "user_id", "user": "user_id", "session": "user_id", "item": "item_id", "time": "time", "label": "label",
    "event": "event", "weight": "weight", "title": "title",
}  # fmt: skip
"""Option of the schema by role. A log of queries has these as users, and a log without users its sessions."""
COLUMNS = (
    "user_id", "item_id", "time", "time_unit", "time_format", "label", "positive_above", "weight", "weight_scale",
    "event", "events", "users_id", "items_id", "missing", "bad_times",
)  # fmt: skip
"""Options of the schema that the columns of the interactions decide, or that decide which rows are read."""
MAX_STEPS = 20  # distinct values up to which numbers may be labels or words types of events, and the highest step
MIN_ROWS, MAX_DISTINCT = 20, 0.95  # rows, and share of distinct values among them, from which a column names rows
MIN_RATINGS = 5  # labels above 0 from which a single one below 0 may stand for no rating
FORMATS = (
    "%d/%b/%Y:%H:%M:%S %z", "%a %b %d %H:%M:%S %z %Y", "%Y-%m-%d %H:%M:%S UTC", "%Y%m%dT%H%M%SZ", "%d %b %Y",
    "%d %b %Y %H:%M:%S", "%b %d, %Y", "%m/%d/%Y %I:%M:%S %p", "%Y-%m", "%Y%m%d", "%Y年%m月%d日",
)  # fmt: skip
"""Formats of text that need `schema.time_format`."""
SAMPLED_ROWS = 200  # distinct values, the first, in which formats are tried

_NAMES = {
    "user": "user uid customer client visitor member buyer reader account 用户",
    "item": "item iid product article movie film song book video news sku asin parent_asin isbn 商品 物品",
    "session": "session visit 会话",
    "query": "query search keyword search_query search_term query_text 搜索词",
    "time": "time timestamp ts date datetime 时间 时间戳 日期",
    "label": "label rating ratings stars score like liked click clicked 评分",
    "event": "event action behavior behaviour type 行为",
    "weight": "weight weights 权重",
}
"""Standard names by role, in plain form."""
_IDENTIFIER = r"_?(id|ids|key|no|number|code|uuid|编号|编码)$"
_AFFIX = dict.fromkeys(("user", "item", "session", "query"), _IDENTIFIER) | {"event": "_type$", "label": "^is_"}
_LAST = {"label": ("rating", "stars", "score"), "session": ("session",), "time": ()}
"""Last words of longer names of a role: book_rating, user_session."""
_TIMES = ("at", "time", "date", "timestamp")
"""Last words of names of columns that are times if their values are."""
_CALENDAR = ("year", "month", "week", "day")
_REFUSALS = {"dislike", "disliked", "unlike", "skip", "hide", "reject", "dismiss", "not", "no"}
_NO_CHOICES = {
    "impression", "impressions", "show", "shown", "exposure", "remove", "removed", "return", "refund", "cancel",
}  # fmt: skip
"""Words of types of events that are no positives: refusals, and what is shown or takes an earlier choice back."""


@dataclass
class Roles:
    """Options of the schema that the columns of the interactions decide, with the reason of each."""

    options: dict[str, TomlValue] = field(default_factory=dict)
    why: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)  # columns that are left out, each with the reason
    unread: set[str] = field(default_factory=set)  # columns of roles without an option, such as sessions of known users

    def put(self, option: str, value: TomlValue, why: str) -> None:
        """Set an option."""
        self.options[option], self.why[option] = value, why

    @property
    def named(self) -> set[str]:
        """Columns that have a role."""
        keys = ("user_id", "item_id", "time", "label", "weight", "event")
        return {str(self.options[key]) for key in keys if self.options.get(key)} | self.unread


def plain(name: str) -> str:
    """Return a name in lower case with underscores between words: `userId`, `user_id:token`, `User ID` are
    `user_id`."""
    name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name.partition(":")[0].strip())
    return re.sub(r"[\W_]+", "_", name.lower()).strip("_")


def role_of_name(name: str) -> str:
    """Return the role that a name is standard for, "" for none."""
    found = plain(name)
    for role, words in _NAMES.items():
        stem, last = re.sub(_AFFIX.get(role, "$^"), "", found), found.rpartition("_")[2]
        if {found, stem} & {*words.split()} or last in _LAST.get(role, ()):
            return role
    return ""


def is_title(name: str) -> bool:
    """Return True for a standard name of titles of items: title, name, product_name."""
    *first, last = plain(name).split("_")
    return last in ("title", "name", "标题", "名称") and (not first or first[-1] in _NAMES["item"].split())


def event_rule(event: str) -> str | float:
    """Return what `schema.events` says of a type by its name: "negative", "ignored", or the weight 1."""
    words = {*plain(event).split("_")}
    return "negative" if words & _REFUSALS else "ignored" if words & _NO_CHOICES else 1


def role_options(columns: Mapping[str, str]) -> dict[str, TomlValue]:
    """Return the options of the schema for columns by role; queries come before users, and users before sessions."""
    none: dict[str, TomlValue] = {option: "" for role, option in OPTION_OF.items() if columns.get(role) == ""}
    none.pop("user_id", None)
    return none | {OPTION_OF[role]: columns[role] for role in reversed(OPTION_OF) if columns.get(role)}


class TimeForm(NamedTuple):
    """Options of the schema for a column of times."""

    unit: str = "s"  # value of time_unit
    format: str = ""  # value of time_format; empty: numbers, or dates that are read without one


def time_form(series: pl.Series, given: str = "") -> TimeForm | None:
    """Return the form in which at least half of the values are times from 1990 to tomorrow; None without one.

    `given` is a format that is not guessed."""
    values = series.drop_nulls()
    values = values.str.strip_chars().unique(maintain_order=True) if values.dtype == pl.String else values
    if not len(values) or values.dtype == pl.Boolean or values.dtype.is_nested():
        return None
    tried = [TimeForm(unit) for unit in ("s", "ms", "us")] if values.dtype != pl.String else [TimeForm()]
    if values.dtype.is_integer():
        tried.append(TimeForm(format="%Y%m%d"))
    elif values.dtype == pl.String:
        values = values.head(SAMPLED_ROWS)
        tried += [TimeForm(format=form) for form in formats_of(values[0], FORMATS)]
    return next((form for form in ([TimeForm(format=given)] if given else tried) if _are_times(values, form)), None)


def _are_times(values: pl.Series, form: TimeForm) -> bool:
    """Return True if at least half of the values are times of this form."""
    # Not validated: a column that is looked at may have a name that no schema has.
    options = {"time": values.name or "time", "time_unit": form.unit, "time_format": form.format}
    times = Times(Schema.model_construct(**options), drops=True)  # type: ignore[arg-type]
    try:
        times.look(values)
    except DataError:
        return False
    return 2 * times.bad <= times.rows


def _is_dated(series: pl.Series) -> bool:
    """Return True for dates and times, and for text of them."""
    if series.dtype != pl.String:
        return series.dtype in (pl.Date, pl.Datetime)
    some = series.drop_nulls().head(SAMPLED_ROWS)
    return not some.str.contains(r"^\s*\d+\s*$").all() and time_form(some) is not None


def _looks_like_time(series: pl.Series) -> bool:
    """Return True for numbers that are all times from 1990 to tomorrow, in s, ms or us since 1970, and for whole
    numbers of a name such as year."""
    values = series.drop_nulls()
    if not len(values) or not values.dtype.is_numeric():
        return False
    first, last = plausible_range()
    is_named = series.dtype.is_integer() and not {*plain(series.name).split("_")}.isdisjoint(_CALENDAR)
    units = (1_000_000, 1_000, 1) if series.n_unique() > MAX_STEPS else ()
    return is_named or any(bool(values.is_between(first / per, last / per).all()) for per in units)


def find_roles(
    frame: pl.DataFrame, given: Mapping[str, TomlValue], columns: Mapping[str, str], has_users: bool = False
) -> Roles:
    """Return the roles of the columns of interactions.

    `given` are options of the schema and `columns` columns by role, with an empty name for a role that no column has.
    With a table of users a query is no user. Raises OpenRoles for all roles that are open."""
    roles = Roles()
    for option, value in {**role_options(columns), **given}.items():
        if value != "" or option not in ("user_id", "item_id"):
            roles.put(option, value, "as given")
    for name in (*roles.named, *(name for role, name in columns.items() if name and role != "title")):
        if name not in frame.columns:
            known = ", ".join(frame.columns[:12])
            raise DataError(f"interactions: no column '{name}'{did_you_mean(name, frame.columns)} (columns: {known})")
    roles.unread = {name for role, name in columns.items() if name and role != "title"} - roles.named
    search = _Search(frame, roles, has_users)
    for find in (search.find_ids, search.find_time, search.find_outcome, search.find_weight):
        find()
    if search.open:
        raise search.question()
    return roles


class _Search:
    """Search for the roles of columns."""

    def __init__(self, frame: pl.DataFrame, roles: Roles, has_users: bool) -> None:
        self.frame, self.roles, self.has_users = frame, roles, has_users
        self.open = dict[str, tuple[list[str], str]]()
        """Columns that may have a role that is open, and the reason."""

    def _free(self, role: str = "") -> list[str]:
        """Return the columns without a role, of a standard name for `role` if that is given."""
        free = [n for n in self.frame.columns if n not in self.roles.named and not n.startswith("__")]
        return [name for name in free if not role or role_of_name(name) == role]

    def _is_function(self, name: str, key: str, other: str = "") -> bool:
        """Return True if each id of the column `key` has one value of a column; ids have several rows. With the column
        of `other` ids a few values may differ."""
        n, frame = self.frame[key].n_unique(), self.frame
        is_exact = 2 * n <= len(frame) and frame.select(pl.struct(key, name).n_unique()).item() == n
        return is_exact or bool(other and measure_constancy(frame[name], frame[key], frame[other]).exists)

    def _varies(self, name: str, what: str, sides: tuple[str, ...] = ("user", "item")) -> bool:
        """Return True for a column of several values for a user and for an item, and note others."""
        user, item = (str(self.roles.options.get(key, "")) for key in ("user_id", "item_id"))
        may_tell = user and item and self.frame.height >= MIN_ROWS and self.frame[name].n_unique() > 1
        for side in sides if may_tell else ():
            if self._is_function(name, *((user, item) if side == "user" else (item, user))):
                self.roles.notes += [f"'{name}': each {side} has one value, so it is no {what} of rows"] if what else []
                return False
        return True

    def _settle(self, role: str, found: list[str], why: str = "", is_needed: bool = False) -> None:
        """Give a role to the only column that may have it, or leave it open: of several columns, and for a reason."""
        if len(found) == 1 and not why:
            self.roles.put(OPTION_OF[role], found[0], "by its name" if role_of_name(found[0]) else "by its type")
        elif found or is_needed:
            self.open[role] = (found, why)

    def find_ids(self) -> None:
        """Find the user, or the query or the session in its place, and the item."""
        roles, frame = self.roles, self.frame
        if "user_id" not in roles.options:
            sessions, users = self._free("session"), self._free("user")
            users = users or self._free("query") if self.has_users else users + self._free("query")
            self._settle("user", users or sessions, is_needed=True)
            if "user_id" in roles.options:
                roles.unread |= {*sessions}
                roles.notes += [f"'{name}': sessions, and '{users[0]}' is the user" for name in sessions if users]
        if "item_id" not in roles.options:
            items, user, why = self._free("item"), str(roles.options.get("user_id", "")), ""
            if len(items) == 1 and len(frame) >= MIN_ROWS:
                n = frame[items[0]].n_unique()
                is_of_user = user and n < frame[user].n_unique() and self._is_function(items[0], user)
                why = "each row has a value of its own" if n >= MAX_DISTINCT * len(frame) else ""
                why = why or "each user has one value" * bool(is_of_user)
            self._settle("item", items, why, is_needed=True)

    def find_time(self) -> None:
        """Find the time of the rows and its form."""
        roles, frame = self.roles, self.frame
        form = str(roles.options.get("time_format", ""))
        if "time" not in roles.options:
            named, free = self._free("time"), self._free()
            odd = [n for n in named if frame[n].dtype == pl.String and time_form(frame[n], form) is None]
            ends = [n for n in free if plain(n).rpartition("_")[2] in _TIMES and time_form(frame[n])]
            dated = [n for n in free if _is_dated(frame[n])] if len(named) != 1 or odd else []
            times = [n for n in free if n in (*named, *ends, *dated)]
            like = [n for n in free if _looks_like_time(frame[n])] if not times else []
            found = [n for n in times or like if self._varies(n, "time") and 2 * missing_count(frame[n]) <= len(frame)]
            why = "its numbers look like times" if like else ""
            self._settle("time", found, "no form reads this text; schema.time_format gives one" if odd else why)
        if not (name := str(roles.options.get("time", ""))) or "time_unit" in roles.options:
            return
        read = time_form(frame[name], form)
        if read is None and frame[name].dtype.is_numeric() and not form:
            roles.put("time_unit", "order", "by its values, which are no times from 1990 to tomorrow")
        elif read is not None and read.unit != "s":
            roles.put("time_unit", read.unit, "by its values")
        elif read is not None and read.format and not form:
            roles.put("time_format", read.format, "by its values")

    def find_outcome(self) -> None:
        """Find the label or the types of events, which exclude each other."""
        roles, frame = self.roles, self.frame
        if not (roles.options.get("label") or roles.options.get("event")):
            labels = [n for n in self._free("label") if "label" not in roles.options and self._is_label(n)]
            events = [n for n in self._free("event") if "event" not in roles.options and self._is_events(n)]
            words = [n for n in labels if not _is_number(frame[n])]
            steps = [] if words or len(labels) != 1 else frame[labels[0]].unique().cast(pl.Float64).sort().to_list()
            is_apart = sum(v < 0 for v in steps) == 1 and MIN_RATINGS <= sum(v > 0 for v in steps) <= MAX_STEPS
            is_apart &= "positive_above" not in roles.options
            why = "a label holds numbers; types of events are words" if words else ""
            why = why or f"{steps[0]:g} may be a refusal, or no rating: then leave its rows out" if is_apart else why
            if len(labels) + len(events) > 1:
                why = why or "a log has one label, or types of events"
            elif not (labels or events or {"label", "weight"} & {*roles.options}):
                labels = [n for n in self._free() if role_of_name(n) in ("", "event") and _is_scale(frame[n])]
                labels = [n for n in labels if not plain(n).endswith("_id") and not missing_count(frame[n])]
                labels = [n for n in labels if self._varies(n, "")]
                why = "a rating, an outcome, or a quantity for `weight`" if labels else ""
            self._settle("label", labels, why)
            self._settle("event", events, why)
        name = str(roles.options.get("label", ""))
        if name and "positive_above" not in roles.options and _is_number(frame[name]):
            roles.put("positive_above", *threshold(frame[name]))
        if (name := str(roles.options.get("event", ""))) and "events" not in roles.options:
            counts = frame[name].cast(pl.String).drop_nulls().value_counts(sort=True, name="n").rows()[: MAX_STEPS + 1]
            why = "; ".join(f"{word} {n:,}" for word, n in counts)
            roles.put("events", {word: event_rule(word) for word, _ in counts}, f"{why}. The weights are yours to set")

    def _is_events(self, name: str) -> bool:
        series = self.frame[name]
        types = series.n_unique() if series.dtype.is_integer() or series.dtype == pl.String else 0
        return 2 <= types <= MAX_STEPS and not series.null_count() and self._varies(name, "type of events")

    def _is_label(self, name: str) -> bool:
        series = self.frame[name]
        if not _is_number(series):
            return self._is_events(name)
        if (n := missing_count(series)) or series.n_unique() < 2:
            why = f"{n:,} values are missing" if n else "it has one value"
            self.roles.notes.append(f"'{name}': {why}, so it is no label")
            return False
        return self._varies(name, "label", ("item",) if series.n_unique() <= MAX_STEPS else ("user", "item"))

    def find_weight(self) -> None:
        """Find the weight of the rows."""
        if "weight" not in self.roles.options:
            numbers = [n for n in self._free("weight") if self.frame[n].dtype.is_numeric()]
            self._settle("weight", [n for n in numbers if self._varies(n, "weight")])

    def question(self) -> OpenRoles:
        """Return the question: open roles, what is taken for what, and all columns with examples."""
        lines = ["interactions: columns have two readings, or no usual name"]
        for role, (names, why) in self.open.items():
            lines.append(f"  {role}: {' or '.join(map(repr, names)) or 'no usual name'}{f' ({why})' * bool(why)}")
        options = {key: self.roles.options.get(key) for key in OPTION_OF.values()}
        taken = [f"{key.removesuffix('_id')} = '{name}'" for key, name in options.items() if name]
        lines += [f"  found: {', '.join(taken)}"] if taken else []
        lines.append("  columns:")
        width = max(map(len, self.frame.columns))
        for series in self.frame:
            some = series.drop_nulls().head(1000).unique(maintain_order=True).head(3).to_list()
            lines.append(f"    {series.name:{width}}  {', '.join(f'{v!s:.24}' for v in some)}".rstrip())
        hint = "'': no column has the role" + "; `query` or `session` may stand for `user`" * ("user" in self.open)
        again = ", ".join(f"`{role}='COLUMN'`" for role in self.open)
        return OpenRoles("\n".join([*lines, f"  ({hint})", f"  again, with {again}"]), lines, [*self.open], hint)


def threshold(series: pl.Series) -> tuple[float, str]:
    """Return the label above which a row is a positive, and the reason.

    The lower one of two values; 0 for values on both sides of 0; the median of the rows for more than MAX_STEPS values,
    or the second largest if the median is the largest; else the middle of the scale, rounded up if it reaches above 1,
    but no more than its second largest."""
    rows = series.cast(pl.Float64)
    rows = rows.filter(rows.is_finite())
    values = rows.unique().sort().to_list()
    if len(values) < 2:
        return 0.0, "it has no two values"
    low, high = values[0], values[-1]
    if len(values) == 2:
        return low, f"two values: {high:g} is a positive, {low:g} a negative"
    if low < 0 < high:
        return 0.0, f"of {low:g} to {high:g}, what is above 0"
    if len(values) > MAX_STEPS:
        why = f"the median of {len(values):,} distinct values from {low:g} to {high:g}, or the second largest"
        return min(float(rows.median()), values[-2]), why  # type: ignore[arg-type]
    middle, is_wide = (low + high) / 2, high > 1
    found = min(float(math.ceil(middle)), values[-2]) if is_wide else middle
    return found, f"the middle of {low:g} to {high:g}{', rounded up' * is_wide}"


def _is_scale(series: pl.Series) -> bool:
    """Return True for 2 to MAX_STEPS numbers in half or whole steps, none above MAX_STEPS, and for truth values."""
    values = series.unique().cast(pl.Float64) if _is_number(series) else pl.Series([], dtype=pl.Float64)
    in_steps = (values.abs() <= MAX_STEPS) & (values * 2 == (values * 2).round())
    return 2 <= len(values) <= MAX_STEPS and bool(in_steps.all())


def _is_number(series: pl.Series) -> bool:
    return series.dtype.is_numeric() or series.dtype == pl.Boolean
