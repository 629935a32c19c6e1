"""Schema: features that do not fit together, names that no column can have, the id feature."""

from __future__ import annotations

import re
from typing import Any

import pytest
from pydantic import ValidationError
from worlds import EVERYTHING_SCHEMA, ID_FEATURES

from twotower.config.toml import parse_config
from twotower.errors import ConfigError
from twotower.features.categorical import Categorical
from twotower.features.numeric import Numeric
from twotower.features.schema import Schema
from twotower.features.sequence import Sequence


@pytest.mark.parametrize(
    ("features", "words"),
    [
        (ID_FEATURES[:1], "no feature on the item side; give each tower at least one, or leave features out"),
        ((*ID_FEATURES[:1], Numeric(name="age", side="user")), "no feature on the item side"),
        ((*ID_FEATURES, Numeric(name="user_id", side="user")), "feature 'user_id' is defined twice in the user tower"),
        (
            (ID_FEATURES[0], Numeric(name="n", side="item"), Sequence(name="s", side="user")),
            "sequence 's' shares the item id embedding, but no categorical feature reads the item id column",
        ),
    ],
)
def test_features_that_do_not_fit_together_are_refused(features: Any, words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        Schema(features=features)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"buckets": 1}, "buckets must be 0"),
        ({"statistic_column": "y"}, "'statistic_column' only goes"),
        ({"statistic_column": "y", "statistic": "count"}, "'statistic_column'"),
    ],
)
def test_numeric_options_that_do_not_fit_together_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        Numeric(name="n", side="user", **options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"user_id": "*"}, "user_id is '*', which tables are searched for as a pattern; rename the column"),
        ({"label": "__positive"}, "label is '__positive'; names that begin with '__' are the package's own"),
        ({"user_id": "id", "item_id": "id"}, "user_id and item_id are both 'id'; give each a column of its own"),
        ({"item_id": ""}, "item_id is empty"),
        ({"features": (*ID_FEATURES, Categorical(name="*", side="user"))}, "name of feature '*' is '*'"),
        (
            {"features": (*ID_FEATURES, Numeric(name="n", column="__row", side="user"))},
            "column of feature 'n' is '__row'",
        ),
        (
            {"features": (*ID_FEATURES, Numeric(name="n", side="item", statistic="mean", statistic_column="^a$"))},
            "statistic_column of feature 'n'",
        ),
    ],
)
def test_fault_G19_a_column_that_no_table_can_have_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        parse_config({"schema": {"features": ID_FEATURES} | options})


def test_the_id_feature_is_the_categorical_that_reads_the_id_column() -> None:
    schema = Schema(
        user_id="u",
        item_id="i",
        features=(Categorical(name="who", column="u", side="user"), Numeric(name="i", side="item")),
    )
    assert schema.id_feature("user") == schema.features[0]
    assert schema.id_feature("item") is None
    assert [f.source for f in schema.features] == ["u", "i"]
    assert EVERYTHING_SCHEMA.side("user") == EVERYTHING_SCHEMA.features[:7]
