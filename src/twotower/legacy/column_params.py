"""The parameter `cols_params` of `DSSMTrainable`: the side and the kind of each column."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import polars as pl
from pydantic import ValidationError

from twotower.errors import ConfigError, DataError, did_you_mean
from twotower.features.categorical import Categorical
from twotower.features.feature import Feature
from twotower.features.multi_hot import MultiHot
from twotower.features.numeric import Numeric
from twotower.features.schema import Schema
from twotower.features.side import ROW_IDS, SIDES, SideName
from twotower.features.vector import Vector

SEED_USER_COLUMNS = ("UserID", "Gender", "Age", "JobID", "ZipCode")
SEED_ITEM_COLUMNS = ("MovieID", "Title", "Genres", "Year", "ratings_count", "ratings_mean")
_KEYS = ("belongs", "use_vec", "vec_len", "emb_size", "bucket")
WEIGHT = "weight"
"""Value of `belongs` of the column that holds the weights of the rows."""
Param = str | float | bool | None
"""Value of a key: a number or a switch, also as text."""


@dataclass(frozen=True)
class ColumnParams:
    """The parameters of one column."""

    column: str
    given: Mapping[str, Param]

    @property
    def is_weight(self) -> bool:
        """True for the column of weights, which no tower reads."""
        return self.given["belongs"] == WEIGHT

    @property
    def side(self) -> SideName:
        """The tower that reads the column."""
        return "user" if self.given["belongs"] == "user" else "item"

    def whole_number(self, key: str) -> int:
        """Return a whole number from a number or its text, 0 if absent. Raises ConfigError."""
        value = self.given.get(key) or 0
        try:
            number = int(value)
        except (TypeError, ValueError):
            number = -1
        if number < 0 or (key == "bucket" and number == 1):
            raise ConfigError(
                f"cols_params['{self.column}']: {key} is {value!r}, expected a whole number of at least 2"
            )
        return number

    def feature(self, dtype: pl.DataType, rate_min: float) -> Feature:
        """Return the feature of a column of a type; categories rarer than `rate_min` share one embedding."""
        name, side, width = self.column, self.side, self.whole_number("emb_size")
        if parse_boolean(self.given.get("use_vec", False)):
            return Vector(name=name, side=side, width=width, length=self.whole_number("vec_len"))
        if isinstance(dtype, pl.List | pl.Array):
            return MultiHot(name=name, side=side, width=width, min_rate=rate_min)
        if dtype.is_float() or self.given.get("bucket"):
            return Numeric(name=name, side=side, width=width, buckets=self.whole_number("bucket"))
        return Categorical(name=name, side=side, width=width, min_rate=rate_min)


def check_params(given: Mapping[str, Mapping[str, Param]] | None, x: pl.DataFrame) -> list[ColumnParams]:
    """Return the parameters of each column, by default of the MovieLens columns. Raises ConfigError and DataError."""
    if given is None:
        known = dict.fromkeys(SEED_USER_COLUMNS, "user") | dict.fromkeys(SEED_ITEM_COLUMNS, "item")
        strange = [c for c in x.columns if c not in known]
        if strange:
            raise ConfigError(
                f"cols_params is missing and column '{strange[0]}' is not one of {', '.join(known)}; "
                "say for each column whether it belongs to 'user' or 'item'"
            )
        given = {c: {"belongs": known[c]} for c in x.columns}
    for column, params in given.items():
        if column not in x.columns:
            raise DataError(f"cols_params: no column '{column}' in x{did_you_mean(column, x.columns)}")
        for key in params:
            if key not in _KEYS:
                raise ConfigError(
                    f"cols_params['{column}']: unknown key '{key}'{did_you_mean(key, _KEYS)} "
                    f"(allowed: {', '.join(_KEYS)})"
                )
        if params.get("belongs") not in ("user", "item", WEIGHT):
            raise ConfigError(
                f"cols_params['{column}']: belongs is {params.get('belongs')!r}, expected 'user', 'item' or '{WEIGHT}'"
            )
        if params["belongs"] == WEIGHT and len(params) > 1:
            raise ConfigError(f"cols_params['{column}']: a column of weights has no other keys; leave them out")
    weights = [column for column, params in given.items() if params["belongs"] == WEIGHT]
    if len(weights) > 1:
        raise ConfigError(f"cols_params: '{weights[0]}' and '{weights[1]}' are both weights; name one")
    return [ColumnParams(column, dict(params)) for column, params in given.items()]


def schema_of(x: pl.DataFrame, params: Iterable[ColumnParams], rate_min: float) -> Schema:
    """Return the schema of the columns; rows have no ids, so the row numbers are the ids. Raises ConfigError."""
    params = list(params)
    features = tuple(p.feature(x[p.column].dtype, rate_min) for p in params if not p.is_weight)
    weight = next((p.column for p in params if p.is_weight), "")
    for side in SIDES:
        if not any(f.side == side for f in features):
            raise ConfigError(f"cols_params: no column belongs to '{side}'; each tower needs at least one")
    try:
        return Schema(user_id=ROW_IDS["user"], item_id=ROW_IDS["item"], weight=weight, features=features)
    except ValidationError as e:
        raise ConfigError(f"cols_params: {e.errors()[0]['msg'].removeprefix('Value error, ')}") from None


def parse_boolean(value: Param) -> bool:
    """Return a boolean from a boolean or its text; 'False' means False. Raises ConfigError."""
    if isinstance(value, bool):
        return value
    text = str(value).strip().lower()
    if text in ("true", "1", "yes", "y", "on"):
        return True
    if text in ("false", "0", "no", "n", "off", "none", ""):
        return False
    raise ConfigError(f"found {value!r}, expected True or False")
