"""Schema of the tables: id, label, event and time columns, and features of users, items and contexts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, JsonValue, ValidationInfo, field_validator, model_validator

from twotower.features.categorical import Categorical
from twotower.features.date import Date
from twotower.features.day_of_week import DayOfWeek
from twotower.features.days_since_previous import DaysSincePrevious
from twotower.features.event_sequence import EventSequence
from twotower.features.feature import Feature, HistorySpec, Statistic
from twotower.features.gap_sequence import GapSequence
from twotower.features.hour_of_day import HourOfDay
from twotower.features.multi_hot import MultiHot
from twotower.features.numeric import Numeric
from twotower.features.sequence import Sequence
from twotower.features.side import ROW_IDS, SIDES, FeatureSide, SideName, tower_side
from twotower.features.text import Text
from twotower.features.vector import Vector
from twotower.kinds import Kinds
from twotower.section import Section

__all__ = [
    "FEATURES", "Categorical", "Date", "DayOfWeek", "DaysSincePrevious", "EventSequence", "Feature", "GapSequence",
    "HourOfDay", "MultiHot", "Numeric", "Schema", "Sequence", "Text", "Vector",
]  # fmt: skip

WEIGHT_RANGE = 1e-6, 1e6
"""Smallest and largest weight above 0, of a column and of a rule."""
OTHER_EVENTS = "*"
"""Key of the rule of all types without a rule of their own."""


class EventRule(Section):
    """Rule of one event type. A number is the weight of a positive, a text is a target."""

    target: Literal["positive", "negative", "input", "ignored"] = Field(
        "positive",
        description="positive, negative: a row to learn from. input: a row of histories, no target. ignored: left out.",
    )
    weight: float = Field(1.0, ge=0, le=WEIGHT_RANGE[1], description="Factor of the row's weight: 0, or 1e-6 to 1e6.")

    @model_validator(mode="before")
    @classmethod
    def _read_short_form(cls, data: Any) -> Any:
        if isinstance(data, str):
            return {"target": data}
        if isinstance(data, int | float) and not isinstance(data, bool):
            return {"weight": data}
        if not isinstance(data, Mapping | EventRule):
            raise ValueError(f"expected a weight, a target or both as {{target, weight}}, got {data!r:.60}")
        return data

    @model_validator(mode="after")
    def _check_weight(self) -> EventRule:
        if 0 < self.weight < WEIGHT_RANGE[0]:
            raise ValueError(f"weight is {self.weight:g}, expected 0, or at least {WEIGHT_RANGE[0]:g}; scale weights")
        if self.target in ("input", "ignored") and self.weight != 1:
            raise ValueError(f"weight is {self.weight:g}, rows of the target '{self.target}' have none; leave it out")
        return self

    @property
    def positive(self) -> bool:
        """True for rows that are positives. Rows of "input" are positives of weight 0."""
        return self.target in ("positive", "input")

    @property
    def factor(self) -> float:
        """Weight of the rows, 0 for "input"."""
        return 0.0 if self.target == "input" else self.weight


FEATURES = Kinds(
    "feature", Feature,
    Categorical, Numeric, Date, MultiHot, Vector, Sequence, EventSequence, GapSequence, Text, HourOfDay, DayOfWeek,
    DaysSincePrevious,
)  # fmt: skip
"""Kinds of features, by their names in a config."""
UnknownIds = Literal["auto", "add", "drop", "error"]
_NEEDED = {
    "time_format": "time", "bad_times": "time", "valid_from": "time", "weight_scale": "weight", "events": "event",
}  # fmt: skip
"""Options, each with the option that names the column that it needs."""
HISTORY = "history"
"""Name of the sequence that a schema without features has."""


def is_pattern(name: str) -> bool:
    """Return True if polars reads a column name as a pattern."""
    return name == "*" or (name.startswith("^") and name.endswith("$"))


class Schema(Section):
    """Columns of the three tables, and features. Ids are external values; rows 0..n-1 are internal.

    The tutorial explains weights, events, repeats and versions.

    **Times.** In `time_format` a month without a day, as "%Y-%m", is its first day. "%z" reads offsets such as +0100.
    Without a format, dates such as 2023-01-31 12:30:15.250 and 31/01/2023 12:30 are read. Times without a zone are in
    UTC, and times before 1990 or after tomorrow are refused. With the unit "order" only the order counts;
    `bad_times = "drop"` then leaves out rows without a number.
    """

    start_here = ("label", "time", "features")

    user_id: str = Field("user_id", description="Id column of users and interactions.")
    item_id: str = Field("item_id", description="Id column of items and interactions.")
    users_id: str = Field("", description="Id column of the table of users, where it has another name. Empty: user_id.")
    items_id: str = Field("", description="Id column of the table of items, where it has another name. Empty: item_id.")
    label: str = Field("", description="Outcome column of the interactions. Empty: every row is a positive.")
    positive_above: float = Field(0.0, description="Label above which a row is a positive.")
    weight: str = Field("", description="Weight column of the interactions: 0, or from 1e-6 to 1e6. Empty: 1 each.")
    weight_scale: Literal["linear", "log"] = Field(
        "linear", description="Scale of the weight column. linear: as it is. log: log2(1 + weight)."
    )
    event: str = Field(
        "", description="Event type column of the interactions: text or whole numbers. Instead of label. Empty: none."
    )
    events: dict[str, EventRule] = Field(
        {},
        description="Rule of each event type: a weight, 'positive', 'negative', 'input', 'ignored', or {target, "
        "weight}. '*': all others.",
    )
    time: str = Field("", description="Time column of the interactions: datetimes, numbers or text. Empty: none.")
    time_unit: Literal["s", "ms", "us", "order"] = Field(
        "s", description="Unit of numeric times since 1970. order: any number or date that grows with time."
    )
    time_format: str = Field(
        "",
        description="strptime format of times in text or whole numbers, such as '%d/%m/%Y %H:%M:%S.%f' or '%Y%m%d'. "
        "Empty: numbers or usual dates.",
    )
    valid_from: str = Field(
        "", description="Column of the users' and items' tables: the time from which a row is valid. Empty: none."
    )
    missing: Literal["error", "drop"] = Field(
        "error", description="Treatment of rows without an id. error: refuse the table. drop: leave them out."
    )
    bad_times: Literal["error", "drop"] = Field(
        "error", description="Rows without a readable, plausible time. error: refuse. drop: leave them out."
    )
    title: str = Field("", description="Title column of the items, shown to people. Empty: the id.")
    duplicates: Literal["last", "keep", "error"] = Field(
        "last",
        description="Repeated ids and (user, item) pairs. last: the last row. keep: all rows of a pair. error: refuse.",
    )
    unknown_users: UnknownIds = Field(
        "auto",
        description="User ids that the users' table lacks. add: users without features. drop: leave out. error: "
        "refuse. auto: add up to a fifth.",
    )
    unknown_items: UnknownIds = Field(
        "auto", description="Treatment of item ids of the interactions that the items' table lacks, as unknown_users."
    )
    features: tuple[Annotated[Feature, FEATURES], ...] = Field(
        (),
        validate_default=True,
        description="Features that the towers read. Empty: the ids, or a history and the item ids if all rows are "
        "positives.",
    )

    @field_validator("features")
    @classmethod
    def _by_default(cls, features: tuple[Feature, ...], info: ValidationInfo) -> tuple[Feature, ...]:
        known = info.data
        if features or not (known.get("user_id") and known.get("item_id")):
            return features
        negatives = bool(known.get("label")) or _any_negative(known.get("events", {}))
        return _default_features(known["user_id"], known["item_id"], negatives)

    @model_validator(mode="after")
    def _check(self) -> Schema:
        self._check_names()
        for side in SIDES:
            if not self.side(side):
                raise ValueError(f"no feature on the {side} side; give each tower at least one, or leave features out")
            names = [f.name for f in self.tower(side)]
            if twice := sorted({n for n in names if names.count(n) > 1}):
                reads = ", which reads the context too" if twice[0] in {f.name for f in self.side("context")} else ""
                raise ValueError(f"feature {twice[0]!r} is defined twice in the {side} tower{reads}; rename one")
        self._check_context()
        for option, column in _NEEDED.items():
            if getattr(self, option) != type(self).model_fields[option].default and not getattr(self, column):
                raise ValueError(f"{option} needs {column}; name the {column} column in schema.{column}, or drop it")
        if self.time_format and ("%" not in self.time_format or "%f" in self.time_format.replace(".%f", "")):
            raise ValueError(
                f"time_format is {self.time_format!r}, expected a format such as '%d/%m/%Y %H:%M:%S.%f'; .%f is a "
                "fraction"
            )
        if "%Z" in self.time_format.replace("%%", ""):
            raise ValueError(
                f"time_format is {self.time_format!r}, and the letters of a zone, %Z, say no offset; write them, as in "
                "'%H:%M:%S UTC', or give offsets and %z"
            )
        self._check_events()
        if self.valid_from and self.time_unit == "order":
            raise ValueError(
                "valid_from and time_unit = 'order' exclude each other: ranks of two tables do not compare; set "
                "time_unit to 's', 'ms' or 'us'"
            )
        for f in self.features:
            f.check(self)
        return self

    def _check_events(self) -> None:
        """Raise ValueError for events without a positive, or with a label."""
        if not self.event:
            return
        if self.label:
            raise ValueError("label and event both say which rows are positives; leave one of them out")
        if not any(rule.positive and rule.factor for rule in self.events.values()):
            raise ValueError(
                f"no type of '{self.event}' is a positive of a weight above 0; name one in schema.events, such as buy "
                "= 1"
            )

    @property
    def weighted(self) -> bool:
        """True if interactions have weights: from a column, or from event rules with a weight other than 1."""
        return bool(self.weight) or any(r.factor != 1 for r in self.events.values() if r.target != "ignored")

    @property
    def has_moments(self) -> bool:
        """True if interactions have times, and these are moments, not only an order."""
        return bool(self.time) and self.time_unit != "order"

    @property
    def has_negatives(self) -> bool:
        """True if rows of a weight above 0 may be negatives: by a label or an event type."""
        return bool(self.label) or _any_negative(self.events)

    @property
    def has_default_features(self) -> bool:
        """True if the features are the default ones."""
        return self.features == _default_features(self.user_id, self.item_id, self.has_negatives)

    def _check_names(self) -> None:
        """Raise ValueError for a column name that no table can have, or with two meanings."""
        for key in ("user_id", "item_id"):
            if not getattr(self, key):
                raise ValueError(f"{key} is empty; name the id column")
            for other in ("item_id", "label", "weight", "event", "time", "valid_from"):
                if key != other and getattr(self, key) == getattr(self, other):
                    raise ValueError(
                        f"{key} and {other} are both '{getattr(self, key)}'; give each a column of its own"
                    )
        for where, name in self._names():
            if is_pattern(name):
                raise ValueError(f"{where} is '{name}', which tables are searched for as a pattern; rename the column")
            if name.startswith("__") and name not in ROW_IDS.values():
                raise ValueError(
                    f"{where} is '{name}'; names that begin with '__' are the package's own: rename the column"
                )

    def _check_context(self) -> None:
        """Raise ValueError for a context feature that no request can give."""
        for f in self.side("context"):
            for key in ("item_id", "label", "weight", "event", "time"):
                if getattr(self, key) and f.source == getattr(self, key):
                    what = "it is the time: use hour_of_day" if key == "time" else "no request knows it: drop it"
                    raise ValueError(f"feature {f.name!r} of the context reads the column of {key}; {what}")

    @property
    def event_types(self) -> tuple[str, ...]:
        """Event types with a code of their own in histories, sorted: codes 1, 2, …; all other types have code 0."""
        named = (t for t, rule in self.events.items() if t != OTHER_EVENTS and rule.target != "ignored")
        return tuple(sorted(named))

    @property
    def reads_types(self) -> bool:
        """True if a history reads the types of events."""
        return any(h.reads_types for h in self.histories())

    def _names(self) -> list[tuple[str, str]]:
        """Return (option, column) for each column that the schema names."""
        own = ("user_id", "item_id", "users_id", "items_id", "label", "weight", "event", "time", "valid_from", "title")
        named = [(key, getattr(self, key)) for key in own]
        for f in self.features:
            named += [(f"{option} of feature {f.name!r}", column) for option, column in f.named_columns()]
        return named

    def of_data(self) -> dict[str, JsonValue]:
        """Return the options that prepared data depend on: all but those that only a model reads."""
        features = [f.model_dump(mode="json", exclude=set(f.of_model)) for f in self.features]
        return self.model_dump(mode="json", exclude={"features"}) | {"features": features}

    def side(self, side: FeatureSide) -> tuple[Feature, ...]:
        """Return the features of one side or of the context, in order."""
        return tuple(f for f in self.features if f.side == side)

    def tower(self, side: SideName) -> tuple[Feature, ...]:
        """Return the features that the tower of a side reads, in order. The user tower reads the context too."""
        return tuple(f for f in self.features if tower_side(f.side) == side)

    def context_columns(self) -> tuple[str, ...]:
        """Return the distinct columns of the interactions that context features read, in order."""
        return tuple(dict.fromkeys(f.source for f in self.side("context") if not f.reads_time))

    def request_context(self) -> list[str]:
        """Return the distinct context columns that a request may give: columns of features, then the time."""
        time = [self.time] if any(f.reads_time for f in self.side("context")) else []
        return list(dict.fromkeys([*self.context_columns(), *time]))

    def required_context(self) -> tuple[str, ...]:
        """Return the distinct columns of the context that a request must give, in order."""
        return tuple(dict.fromkeys(f.source for f in self.side("context") if not f.reads_time and f.defaults is None))

    @property
    def precomputes(self) -> bool:
        """True if a user has a vector without a request: there is no context, or all of it has defaults."""
        return all(f.defaults is not None for f in self.side("context"))

    def columns(self, side: FeatureSide) -> tuple[Feature, ...]:
        """Return the features of one side that are columns of its table or statistics, in order."""
        return tuple(f for f in self.side(side) if not f.history)

    def histories(self, *sides: SideName) -> tuple[HistorySpec, ...]:
        """Return the histories of some sides, by default of both, in order."""
        return tuple(f.history for f in self.features if f.history and f.side in (sides or SIDES))

    def statistics(self, *sides: SideName) -> tuple[Statistic, ...]:
        """Return the statistics of some sides, by default of both, in order."""
        return tuple(f.computes for f in self.features if f.computes and f.side in (sides or SIDES))

    def searchable(self) -> tuple[Feature, ...]:
        """Return the features of the user tower that can read a search text, in order."""
        return tuple(f for f in self.tower("user") if f.searchable)

    def host_of(self, feature: Feature) -> Feature | None:
        """Return the sequence that a sequence is added to; None if it is pooled on its own."""
        return next((f for f in self.side(feature.side) if feature.history and feature.name in f.added_histories), None)

    def id_column(self, side: SideName) -> str:
        return self.user_id if side == "user" else self.item_id

    def table_id(self, side: SideName) -> str:
        """Return the id column in the file of a side's table; it is read under the name of `id_column`."""
        return (self.users_id if side == "user" else self.items_id) or self.id_column(side)

    def code_feature(self, side: SideName, name: str = "") -> Feature | None:
        """Return the feature of a side with this name, by default of its ids; None if a row has not one code."""
        if not name and (found := self.id_feature(side)):
            return found
        fits = (f for f in self.columns(side) if (f.name == name if name else f.source == self.id_column(side)))
        return next((f for f in fits if f.has_code), None)

    def id_feature(self, side: SideName) -> Feature | None:
        """Return the feature of the side's id column with a code for each id, else None."""
        return next((f for f in self.side(side) if f.identifies and f.source == self.id_column(side)), None)


def _any_negative(events: Mapping[str, EventRule]) -> bool:
    """Return True if a rule makes negatives of a weight above 0."""
    return any(rule.target == "negative" and rule.weight for rule in events.values())


def _default_features(user_id: str, item_id: str, has_negatives: bool) -> tuple[Feature, ...]:
    """Return the features of a schema without features.

    Labelled rows: ids, so that biases learn the shares of positives. Positives alone: a history in place of the user's
    id, whose embeddings are the items', so that it serves users with few rows."""
    user: Feature = Categorical(name=user_id, side="user")
    if not has_negatives:
        user = Sequence(name=HISTORY, side="user")
    return user, Categorical(name=item_id, side="item")
