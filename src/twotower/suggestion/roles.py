"""Roles of the columns of a log by standard names and types, and the question where two readings are possible."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypedDict

import polars as pl

from twotower.config.toml import TomlValue
from twotower.data.constant_columns import measure_constancy
from twotower.errors import DataError, did_you_mean, listed
from twotower.features.values import missing_count
from twotower.suggestion.times import is_dated, looks_like_seconds, time_form


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
MAX_EVENT_TYPES = 20  # types of events up to which a column is one of event types
MAX_STEPS = 20  # distinct values up to which numbers may be labels, and the highest of their steps
MIN_ROWS, MAX_DISTINCT = 20, 0.95  # rows, and share of distinct values among them, from which a column names rows
MIN_TAIL = 10  # multiple of the median that a hundredth of the weights exceeds, if they are read on the log scale
MIN_RATINGS, MIN_APART, MIN_UNRATED = 5, 4, 0.05
"""A label for no rating has this many ratings above it, this multiple of the rows of the lowest, this share of all."""

_KNOWN = {
    "user": "user u uid customer visitor client member buyer shopper reader listener viewer reviewer account player",
    "item": "item i iid product article movie film song track book video sku asin parent_asin isbn news game course "
    "anime page",
    "session": "session visit user_session",
    "query": "query search search_query search_term query_text search_text keyword keywords q",
    "time": "time timestamp ts date datetime",
    "label": "label rating ratings star stars score like liked click clicked is_click is_like target",
    "event": "event event_type type action action_type behavior behavior_type behaviour behaviour_type",
    "weight": "weight weights",
}
"""Standard names by role, in plain form."""
_TEAMS = ("team", "team_id")
"""Names of items unless another column of texts or of a name in _id may hold them."""
_RATINGS = ("rating", "ratings", "stars", "score")
_YEARS, FIRST_YEAR, LAST_YEAR = ("year", "year_id"), 1800, 2200
"""Names of years that are the time of a log without another time, and the least and the largest of them."""
_CHINESE = {
    "用户": "user", "会员": "member", "客户": "customer", "顾客": "customer", "买家": "buyer", "商品": "item",
    "物品": "item", "产品": "product", "电影": "movie", "歌曲": "song", "文章": "article", "图书": "book",
    "视频": "video", "新闻": "news", "编号": "id", "标识": "id", "编码": "code", "时间戳": "timestamp", "时间": "time",
    "日期": "date", "评分": "rating", "打分": "score", "分数": "score", "权重": "weight", "行为类型": "event_type",
    "行为": "behavior", "事件": "event", "搜索词": "query", "查询词": "query", "关键词": "keyword", "会话": "session",
    "标题": "title", "名称": "name", "片名": "title", "书名": "title", "点击": "click", "浏览": "view", "播放": "play",
    "收藏": "favorite", "加购": "cart", "购买": "purchase", "喜欢": "like", "交互": "interactions", "日志": "log",
    "记录": "log", "订单": "orders", "训练": "train", "验证": "validation", "测试": "test", "年龄": "age",
    "价格": "price", "年份": "year",
}  # fmt: skip
"""Chinese words of names, the longer before those that they begin with."""
_UNDOINGS = "remove removed delete deleted unlike return returned refund refunded cancel canceled cancelled unfollow"
_REFUSALS = f"dislike disliked skip skipped hide hidden reject rejected downvote report dismiss decline {_UNDOINGS}"
_SHOWN = "impression impressions show shown exposure expose display displayed"
_CHOICES = (
    "view views click clicks pv buy purchase transaction order checkout cart addtocart fav favorite favourite like "
    "love upvote play watch listen read open detail share save bookmark wishlist comment review rate follow subscribe "
    "download install book apply search"
)
_IDENTIFIER = re.compile(r"(.+?)_?(?:id|ids|key|no|number|code|uuid)")


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
    """Return a name in lower case with underscores between words: `userId`, `user_id:token`, `用户ID` are `user_id`."""
    name = name.partition(":")[0].strip()
    for word, english in _CHINESE.items():
        name = name.replace(word, f" {english} ")
    return re.sub(r"[^0-9a-z]+", "_", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()).strip("_")


def role_of_name(name: str) -> str:
    """Return the role that a name is standard for, "" for none."""
    found = plain(name)
    stem = m[1] if (m := _IDENTIFIER.fullmatch(found)) else found
    for role, words in _KNOWN.items():
        if found in words.split() or (role in ("user", "item", "session", "query") and stem in words.split()):
            return role
    of, _, last = found.rpartition("_")  # book_rating
    return "label" if last in _RATINGS and of in (*_KNOWN["item"].split(), "user") else ""


def is_title(name: str) -> bool:
    """Return True for a standard name of titles of items: title, name, product_name."""
    *first, last = plain(name).split("_")
    return last in ("title", "name") and (not first or first[-1] in _KNOWN["item"].split())


def is_undoing(event: str) -> bool:
    """Return True for a type of events that takes an earlier choice back, such as refund or remove_from_cart."""
    return bool(_ends(event) & {*_UNDOINGS.split()})


def event_rule(event: str) -> str | float | None:
    """Return what `schema.events` says of a type by its name: "ignored", "negative" or 1; None for an unknown one."""
    ends = _ends(event)
    if ends & {*_REFUSALS.split()}:
        return "negative"
    if plain(event).partition("_")[0] in ("not", "no", "non", "never"):
        return "negative" if ends & {*_CHOICES.split()} else None
    if ends & {*_SHOWN.split()} and plain(event).rpartition("_")[2] not in _CHOICES.split():
        return "ignored"
    return 1 if ends & {*_CHOICES.split()} else None


def _ends(name: str) -> set[str]:
    """Return a name in plain form, its first and its last word."""
    found = plain(name)
    return {found, found.partition("_")[0], found.rpartition("_")[2]}


def role_options(columns: Mapping[str, str]) -> dict[str, TomlValue]:
    """Return the options of the schema for columns by role; queries come before users, and users before sessions."""
    none: dict[str, TomlValue] = {option: "" for role, option in OPTION_OF.items() if columns.get(role) == ""}
    none.pop("user_id", None)
    return none | {OPTION_OF[role]: columns[role] for role in reversed(OPTION_OF) if columns.get(role)}


def find_roles(
    frame: pl.DataFrame, given: Mapping[str, TomlValue], columns: Mapping[str, str],
    tables: Mapping[str, pl.DataFrame | None],
) -> Roles:  # fmt: skip
    """Return the roles of the columns of interactions.

    `given` are options of the schema and `columns` columns by role, with an empty name for a role that no column has.
    `tables` are the tables of "users" and "items". Raises DataError with one question for all roles that are open."""
    roles = Roles()
    for option, value in {**role_options(columns), **given}.items():
        if value != "" or option not in ("user_id", "item_id"):
            roles.put(option, value, "as given")
    for name in (*roles.named, *(name for role, name in columns.items() if name and role != "title")):
        if name not in frame.columns:
            known = ", ".join(frame.columns[:12])
            raise DataError(f"interactions: no column '{name}'{did_you_mean(name, frame.columns)} (columns: {known})")
    roles.unread = {name for role, name in columns.items() if name and role != "title"} - roles.named
    search = _Search(frame, roles, tables)
    search.find_ids()
    search.find_time()
    search.find_outcome()
    search.find_weight()
    if search.open:
        raise DataError(search.question())
    return roles


class _Search:
    """Search for the roles of columns."""

    def __init__(self, frame: pl.DataFrame, roles: Roles, tables: Mapping[str, pl.DataFrame | None]) -> None:
        self.frame, self.roles, self.tables = frame, roles, tables
        self.open = dict[str, tuple[list[str], str]]()
        """Columns that may have a role that is open, and the reason."""

    def _free(self, role: str = "") -> list[str]:
        """Return the columns without a role, of a standard name for `role` if that is given."""
        free = [n for n in self.frame.columns if n not in self.roles.named and not n.startswith("__")]
        return [name for name in free if not role or role_of_name(name) == role]

    def find_ids(self) -> None:
        """Find the user, or the query or the session in its place, and the item."""
        roles = self.roles
        if "user_id" not in roles.options:
            sessions, queries = self._free("session"), self._free("query")
            users = self._shared("users", self._free("user"))
            users += queries if self.tables.get("users") is None else []
            if len(found := users or queries or sessions) == 1:
                roles.put("user_id", found[0], "by its name")
                roles.unread |= {*sessions}
                roles.notes += [f"'{name}': sessions, and '{found[0]}' is the user" for name in sessions if users]
            else:
                self.open["user"] = (found, "")
        if "item_id" not in roles.options:
            items = self._shared("items", self._free("item"))
            is_row = len(items) == 1 and len(self.frame) >= MIN_ROWS
            is_row &= bool(items) and self.frame[items[0]].n_unique() >= MAX_DISTINCT * len(self.frame)
            why = "each row has a value of its own" if is_row else ""
            why = why or "each user has one value" * (len(items) == 1 and self._is_of_user(items[0]))
            if len(items) == 1 and not why:
                roles.put("item_id", items[0], "by its name")
            elif not items and (item := self._event_as_item() or self._team_as_item()):
                roles.put("item_id", item, "what users take: no other column has as many values")
            else:
                self.open["item"] = (items, why)

    def _is_of_user(self, name: str) -> bool:
        """Return True if each user has one value of a column, which users share; a user has several rows."""
        user = str(self.roles.options.get("user_id", ""))
        n = self.frame[user].n_unique() if user else len(self.frame)
        if n > len(self.frame) / 2 or self.frame.select(pl.struct(user, name).n_unique()).item() != n:
            return False
        return self.frame[name].n_unique() < n

    def _event_as_item(self) -> str:
        """Return the column of events of a log of known users if no other may hold items, "" for none.

        Another column may hold items if it has as many values, is no time and varies for a user."""
        return self._of_most_values(self._free("event"), self._free())

    def _team_as_item(self) -> str:
        """Return the column of teams if no other text or id may hold items, "" for none. Numbers may be statistics."""
        free = self._free()
        others = [n for n in free if self.frame[n].dtype == pl.String or plain(n).endswith("_id")]
        return self._of_most_values([n for n in free if plain(n) in _TEAMS], others)

    def _of_most_values(self, named: list[str], others: list[str]) -> str:
        """Return the only named column if it has more values than any of the others that may hold items, else ""."""
        if len(named) != 1 or self.open or role_of_name(str(self.roles.options["user_id"])) != "user":
            return ""
        others = [n for n in others if n != named[0] and _is_id(self.frame[n]) and not self._is_of_user(n)]
        others = [n for n in others if not is_dated(self.frame[n]) and plain(n) not in _YEARS]
        others = [n for n in others if role_of_name(n) not in ("session", "time")]
        most = max((self.frame[n].n_unique() for n in others), default=1)
        return named[0] if _is_id(self.frame[named[0]]) and self.frame[named[0]].n_unique() > most else ""

    def _shared(self, table: str, named: list[str]) -> list[str]:
        """Return those of some columns that a table has too, or else the only other one that is a key of the table."""
        if (other := self.tables.get(table)) is None:
            return named
        keys = [name for name in self._free() if name in other.columns and _is_id(other[name])]
        keys = [name for name in keys if not other[name].is_duplicated().any()]
        return [name for name in named if name in other.columns] or named or (keys if len(keys) == 1 else [])

    def find_time(self) -> None:
        """Find the time of the rows and its form."""
        roles, frame = self.roles, self.frame
        form = str(roles.options.get("time_format", ""))
        if "time" not in roles.options:
            exact, seen = self._free("time"), self._free()
            ends = [name for name in seen if plain(name).rpartition("_")[2] in (*_KNOWN["time"].split(), "at")]
            odd = [n for n in exact if frame[n].dtype == pl.String and time_form(frame[n], form) is None]
            times = [n for n in seen if n in exact or is_dated(frame[n]) or (n in ends and time_form(frame[n]))]
            if len(exact) == 1 and not odd:  # a standard name comes before dates that no name says are times
                times = [n for n in times if n in exact or n in ends]
            years = [n for n in seen if plain(n) in _YEARS and _are_years(frame[n])] if not times else []
            times += years
            like = [n for n in seen if looks_like_seconds(frame[n]) and frame[n].n_unique() > MAX_STEPS]
            found = [n for n in times or like if self._varies(n, "time") and 2 * missing_count(frame[n]) <= len(frame)]
            parts = [n for n in seen if {*found} & {*years} and plain(n) in ("month", "week", "day")]
            if len(found) > 1 or {*found} & {*like} - {*times} or {*found} & {*odd} or parts:
                why = "a text that no form reads; schema.time_format gives one" if odd else ""
                why = f"a year, and {listed([*map(repr, parts)])} too" if parts else why
                self.open["time"] = (found, why if times else "its numbers look like times")
            elif found:
                roles.put("time", found[0], "by its name" if found[0] in (*exact, *ends, *years) else "by its type")
        if not (name := str(roles.options.get("time", ""))) or "time_unit" in roles.options:
            return
        read = time_form(frame[name], form)
        if read is None and frame[name].dtype.is_numeric() and not form:
            roles.put("time_unit", "order", "by its values, which are no times from 1990 to tomorrow")
        elif read is not None and read.unit != "s":
            roles.put("time_unit", read.unit, "by its values")
        elif read is not None and read.format and not form:
            roles.put("time_format", read.format, "by its values")

    def _varies(self, name: str, what: str, sides: tuple[str, ...] = ("user", "item")) -> bool:
        """Return True for a column of several values for a user and for an item, and note others."""
        frame, ids = self.frame, {side: str(self.roles.options.get(f"{side}_id", "")) for side in ("user", "item")}
        may_tell = all(ids.values()) and frame.height >= MIN_ROWS and frame[name].n_unique() > 1
        for side in sides if may_tell else ():
            key, other = ids[side], ids["item" if side == "user" else "user"]
            n = frame[key].n_unique()
            is_one = 2 * n <= frame.height and frame.select(pl.struct(key, name).n_unique()).item() == n
            if is_one or (2 * n <= frame.height and measure_constancy(frame[name], frame[key], frame[other]).exists):
                self.roles.notes += [f"'{name}': each {side} has one value, so it is no {what} of rows"] if what else []
                return False
        return True

    def find_outcome(self) -> None:
        """Find the label or the types of events, which exclude each other."""
        roles, frame = self.roles, self.frame
        is_open = not (roles.options.get("label") or roles.options.get("event"))
        may_be = [n for n in self._free("label") if is_open and "label" not in roles.options]
        labels = [n for n in may_be if self._is_label(n)]
        words = [n for n in may_be if frame[n].dtype == pl.String and self._is_events(n)]
        may_be = [n for n in self._free("event") if is_open and "event" not in roles.options]
        events = [n for n in may_be if self._is_events(n)]
        if len(labels) + len(events) + len(words) > 1 or words:
            why = "a label holds numbers; `event` reads words" if words else "a log has a label or types of events"
            self.open |= {"label": ([*labels, *words], why)} if labels or words else {}
            self.open |= {"event": (events, "")} if events else {}
        elif labels:
            roles.put("label", labels[0], "by its name")
        elif events:
            roles.put("event", events[0], "by its name")
        elif is_open and not {"label", "weight"} & {*roles.options}:
            numbers = [n for n in self._free() if role_of_name(n) in ("", "event", "label") and _is_scale(frame[n])]
            numbers = [n for n in numbers if not missing_count(frame[n]) and self._varies(n, "")]
            self.open |= {"label": (numbers, "a rating, an outcome, or a quantity for `weight`")} if numbers else {}
        name = str(roles.options.get("label", ""))
        if name and "positive_above" not in roles.options and _is_number(frame[name]):
            roles.put("positive_above", *threshold(frame[name]))
        if (name := str(roles.options.get("event", ""))) and "events" not in roles.options:
            counts = frame[name].cast(pl.String).drop_nulls().value_counts(sort=True, name="n").rows()
            known = {word: event_rule(word) for word, _ in counts[: MAX_EVENT_TYPES + 1]}
            unknown = [f"'{word}'" for word, rule in known.items() if rule is None]
            why = "; ".join(f"{word} {n:,}" for word, n in counts[: MAX_EVENT_TYPES + 1])
            why += f". No list knows {', '.join(unknown)}: their weights are yours to set" if unknown else ""
            roles.put("events", {word: 1 if rule is None else rule for word, rule in known.items()}, why)

    def _is_events(self, name: str) -> bool:
        series = self.frame[name]
        types = series.n_unique() if _is_id(series) and not series.null_count() else 0
        return 2 <= types <= MAX_EVENT_TYPES and self._varies(name, "type of events")

    def _is_label(self, name: str) -> bool:
        series = self.frame[name]
        if not _is_number(series):
            return False
        if missing_count(series) or series.n_unique() < 2:
            n = missing_count(series)
            why = f"{n:,} values are missing" if n else "it has one value"
            self.roles.notes.append(f"'{name}': {why}, so it is no label")
            return False
        return self._varies(name, "label", ("item",) if series.n_unique() <= MAX_STEPS else ("user", "item"))

    def find_weight(self) -> None:
        """Find the weight and its scale."""
        roles, frame = self.roles, self.frame
        if "weight" not in roles.options:
            numbers = [n for n in self._free("weight") if frame[n].dtype.is_numeric() and not missing_count(frame[n])]
            found = [n for n in numbers if float(frame[n].min()) >= 0 and self._varies(n, "weight")]  # type: ignore[arg-type]
            if len(found) > 1:
                self.open["weight"] = (found, "")
            elif found:
                roles.put("weight", found[0], "by its name")
        name = str(roles.options.get("weight", ""))
        if name and "weight_scale" not in roles.options and frame[name].dtype.is_numeric():
            above = frame[name].filter(frame[name] > 0).cast(pl.Float64)
            times = float(above.quantile(0.99) or 0) / float(above.median() or 1)  # type: ignore[arg-type]
            if times >= MIN_TAIL:
                why = f"a hundredth of its values exceeds {times:.3g} times their median (threshold {MIN_TAIL})"
                roles.put("weight_scale", "log", why)

    def question(self) -> str:
        """Return the question: open roles, what is taken for what, all columns with examples, and what settles it."""
        frame, options = self.frame, self.roles.options
        may_be = {role: " or ".join(map(repr, names)) or "no standard name" for role, (names, _) in self.open.items()}
        open_roles = "; ".join(
            f"{role}: {may_be[role]}{f' ({why})' * bool(why)}" for role, (_, why) in self.open.items()
        )
        taken = [
            f"{role} = '{options[key]}'"
            for role, key in OPTION_OF.items()
            if role not in ("query", "session") and options.get(key)
        ]
        heads = {
            name: frame[name].drop_nulls().head(1000).unique(maintain_order=True).head(3) for name in frame.columns
        }
        shown = ", ".join(
            f"'{name}' ({', '.join(f'{v!s:.24}' for v in head.to_list())})" for name, head in heads.items()
        )
        need = [f"`{role}='COLUMN'`" + " (or `query` or `session`)" * (role == "user") for role in self.open]
        none = "" if {*self.open} <= {"user", "item"} else "; an empty name, '', if none has it"
        return (
            f"interactions: the roles of columns are open. {open_roles}. Taken so far: {', '.join(taken) or 'none'}. "
            f"Columns: {shown}. Name them: {listed(need)}{none}"
        )


def threshold(series: pl.Series) -> tuple[float, str]:
    """Return the label above which a row is a positive, and the reason. A label for no rating is none of the values.

    The lower one of two values; 0 for values on both sides of 0; the median of the rows for more than MAX_STEPS values,
    or the second largest if the median is the largest; else the middle of the scale, rounded up if it reaches above 1,
    but no more than its second largest."""
    rows, apart = _numbers(series), no_rating(series)
    rows = rows if apart is None else rows.filter(rows != apart)
    values = rows.unique().sort().to_list()
    if len(values) < 2:
        return (values or [0.0])[0] * 0.0, "it has no two values"
    low, high = values[0], values[-1]
    if len(values) == 2:
        return low, f"two values: {high:g} is a positive, {low:g} a negative"
    if low < 0 < high:
        return 0.0, f"of {low:g} to {high:g}, what is above 0"
    if len(values) > MAX_STEPS:
        why = f"the median of {len(values):,} distinct values from {low:g} to {high:g}, or the second largest"
        return min(float(rows.median()), values[-2]), why  # type: ignore[arg-type]
    middle = (low + high) / 2
    why = f"the middle of {low:g} to {high:g}{', rounded up' * (high > 1)}"
    why += f"; {apart:g} is for no rating" if apart is not None else ""
    return (min(float(math.ceil(middle)), values[-2]) if high > 1 else middle), why


def no_rating(series: pl.Series) -> float | None:
    """Return the label that stands for no rating, such as 0 or -1 where ratings are 1 to 10; None without one.

    It is the only one that is not above 0, and has many more rows than the lowest rating, which has fewer than the mean
    of the ratings. A 0, which may also be a grade, has more rows than all ratings together."""
    counts = _numbers(series).alias("label").value_counts(name="rows").sort("label")
    labels, rows = counts["label"].to_list(), counts["rows"].to_list()
    if not MIN_RATINGS < len(labels) <= MAX_STEPS + 1 or not labels[0] <= 0 < labels[1]:
        return None
    own, lowest, rated = rows[0], rows[1], sum(rows[1:])
    is_apart = own >= MIN_APART * lowest and own >= MIN_UNRATED * (own + rated) and lowest < rated / len(rows[1:])
    return float(labels[0]) + 0.0 if is_apart and (labels[0] < 0 or own > rated) else None


def _numbers(series: pl.Series) -> pl.Series:
    numbers = series.cast(pl.Float64)
    return numbers.filter(numbers.is_finite())


def _is_scale(series: pl.Series) -> bool:
    """Return True for 2 to MAX_STEPS numbers in half or whole steps, none above MAX_STEPS, and for truth values."""
    values = series.unique().cast(pl.Float64) if _is_number(series) else pl.Series([], dtype=pl.Float64)
    in_steps = (values.abs() <= MAX_STEPS) & (values * 2 == (values * 2).round())
    return 2 <= len(values) <= MAX_STEPS and bool(in_steps.all())


def _are_years(series: pl.Series) -> bool:
    return series.dtype.is_integer() and bool(series.drop_nulls().is_between(FIRST_YEAR, LAST_YEAR).all())


def _is_id(series: pl.Series) -> bool:
    return series.dtype.is_integer() or series.dtype == pl.String


def _is_number(series: pl.Series) -> bool:
    return series.dtype.is_numeric() or series.dtype == pl.Boolean
