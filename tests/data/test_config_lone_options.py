"""Options that lack another are refused, or reported where they change nothing; runs that have them load."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from worlds import CHECKERBOARD_SCHEMA, ID_FEATURES, checkerboard, settings

import twotower
from twotower.data import prepare
from twotower.data.config import DataConfig, check_lone_options
from twotower.data.dataset import build_dataset
from twotower.data.split import SplitConfig
from twotower.data.tables import check
from twotower.errors import ConfigError
from twotower.features.categorical import Categorical
from twotower.features.numeric import Numeric
from twotower.features.schema import Schema
from twotower.features.text import Text

ALL_POSITIVE = CHECKERBOARD_SCHEMA.model_copy(update={"label": ""})
MEAN = Numeric(name="mean", side="user", statistic="mean")
CONFIG = settings(negatives={"random": 3}, train={"epochs": 1, "monitor": "validation.recall@5"})


def with_features(schema: Schema, *features: Any, **options: Any) -> Schema:
    return schema.model_copy(update={"features": (*ID_FEATURES, *features), **options})


LONE = {
    "threshold": (
        with_features(ALL_POSITIVE, positive_above=3.0),
        "schema.positive_above = 3 is of a label, and schema.label is empty, so every row is a positive; name the "
        "column of the label, or leave",
    ),
    "mean": (
        with_features(ALL_POSITIVE, MEAN),
        "feature 'mean' averages the labels of the interactions, and all are positives, so it is the same number for "
        "all; name a column in",
    ),
}


@pytest.mark.parametrize("case", LONE)
def test_data_that_are_other_than_an_option_says_are_refused_before_anything_is_written(
    tmp_path: Path, case: str
) -> None:
    schema, words = LONE[case]
    tables, split = checkerboard(), SplitConfig()
    data = build_dataset(check(*tables, schema), schema, split)
    for given in (tables, data):
        with pytest.raises(ConfigError, match=words):
            twotower.fit(given, schema, CONFIG, folder=tmp_path / "run")
    tables[2].write_parquet(tmp_path / "log.parquet")
    config = DataConfig(interactions=str(tmp_path / "log.parquet"))
    with pytest.raises(ConfigError, match=words):
        prepare.write_prepared(config, schema, split, tmp_path / "prepared")
    with pytest.raises(ConfigError, match=words):
        prepare.write_buckets(config, schema, tmp_path / "buckets")
    assert [path.name for path in tmp_path.iterdir() if path.name != ".lock"] == ["log.parquet"]


def test_options_that_have_what_they_need_are_fine(caplog: pytest.LogCaptureFixture) -> None:
    paid = Numeric(name="paid", side="user", statistic="mean", statistic_column="at")
    rules = {"event": "type", "events": {"buy": {"weight": 1}, "skip": "negative"}}
    of_events = Schema.model_validate({**rules, "features": [f.model_dump() for f in (*ID_FEATURES, MEAN)]})
    check_lone_options(
        with_features(CHECKERBOARD_SCHEMA, MEAN, positive_above=3.0), SplitConfig(test=0.4, validation=0)
    )
    check_lone_options(with_features(ALL_POSITIVE, paid), SplitConfig(kind="last", validation=0))
    check_lone_options(of_events, SplitConfig(kind="column", column="fold"))
    hashed = Categorical(name="city", side="user", hash_buckets=8), Text(name="title", side="item", hash_buckets=8)
    check_lone_options(with_features(CHECKERBOARD_SCHEMA, *hashed))
    cut = Categorical(name="city", side="user", min_count=3), Text(name="title", side="item", max_grams=8)
    check_lone_options(with_features(CHECKERBOARD_SCHEMA, *cut), SplitConfig(kind="time", test=0.4))
    assert not caplog.messages


def test_a_threshold_beside_events_is_told(caplog: pytest.LogCaptureFixture) -> None:
    check_lone_options(Schema.model_validate({"event": "type", "events": {"buy": 1}, "positive_above": 3}))
    assert caplog.messages == [
        "schema.positive_above = 3 changes nothing, as schema.events tells which rows are positives; leave it out"
    ]


@pytest.mark.parametrize(
    ("split", "told"),
    [
        ({"kind": "last", "test": 0.4},
         "split.test = 0.4 changes nothing, as split.kind = 'last' tests the last row of each user"),
        ({"kind": "last", "test": 0.4, "validation": 0}, "split.test = 0.4 changes nothing, as split.kind = 'last'"),
        ({"kind": "last", "validation": 0.3}, "split.validation = 0.3 changes nothing, as split.kind = 'last'"),
        ({"kind": "column", "column": "fold", "test": 0.4, "validation": 0},
         "split.test = 0.4 changes nothing, as split.kind = 'column' reads the parts of the column 'fold'"),
        ({"kind": "files", "test": 0.1},
         "split.test = 0.1 changes nothing, as split.kind = 'files' reads the parts of the files; leave it out"),
    ],
)  # fmt: skip
def test_shares_that_a_rule_does_not_read_are_told(
    split: dict[str, Any], told: str, caplog: pytest.LogCaptureFixture
) -> None:
    check_lone_options(CHECKERBOARD_SCHEMA, SplitConfig.model_validate(split))
    (line,) = caplog.messages
    assert line.startswith(told)
    assert caplog.records[0].levelno == logging.WARNING
    assert caplog.records[0].name.startswith("twotower.")


def test_cuts_of_a_vocabulary_that_buckets_take_the_place_of_are_told(caplog: pytest.LogCaptureFixture) -> None:
    hashed = (
        Categorical(name="city", side="user", hash_buckets=8, min_count=3, min_rate=0.1),
        Text(name="title", side="item", hash_buckets=8, max_grams=9),
    )
    check_lone_options(with_features(CHECKERBOARD_SCHEMA, *hashed))
    assert [line.split(",")[0] for line in caplog.messages] == [
        "feature 'city': min_count and min_rate change nothing",
        "feature 'title': max_grams changes nothing",
    ]


def test_a_training_and_a_preparation_tell_it_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    users, items, log = checkerboard()
    split, words = {"kind": "last", "test": 0.4}, "split.test = 0.4 changes nothing"
    twotower.fit((users, items, log), CHECKERBOARD_SCHEMA, settings(split=split, train={"epochs": 1}))
    assert sum(words in line for line in caplog.messages) == 1
    caplog.clear()
    log.write_parquet(tmp_path / "log.parquet")
    data = DataConfig(interactions=str(tmp_path / "log.parquet"))
    prepare.write_prepared(data, CHECKERBOARD_SCHEMA, SplitConfig.model_validate(split), tmp_path / "out")
    assert sum(words in line for line in caplog.messages) == 1
