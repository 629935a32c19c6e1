"""Types of events: positives, negatives, weights, inputs and rows left out, in memory and prepared."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from data.test_prepare import SMALL, in_memory, shards, tables
from messages import one_line
from worlds import EVERYTHING_SCHEMA

from twotower.config.toml import dump_config, load_config, parse_config
from twotower.data import prepare
from twotower.data.buckets.check import check_buckets
from twotower.data.config import DataConfig
from twotower.data.dataset import Dataset, build_dataset
from twotower.data.split import SplitConfig
from twotower.data.tables import check
from twotower.errors import ConfigError, DataError
from twotower.features.schema import Schema

SHOP = """
[schema]
event = "type"
events.view = 0.2
events.cart = 1
events.buy = 3
events.skip = "negative"
[[schema.features]]
name = "user_id"
kind = "categorical"
side = "user"
[[schema.features]]
name = "item_id"
kind = "categorical"
side = "item"
"""
LOG = pl.DataFrame(
    {
        "user_id": [1, 1, 2, 2, 3, 3],
        "item_id": [1, 2, 3, 1, 2, 3],
        "type": ["view", "cart", "buy", "skip", "ping", "play"],
    }
)
FEATURES = [{"kind": "categorical", "name": f"{side}_id", "side": side} for side in ("user", "item")]


def events(**rules: Any) -> Schema:
    return Schema.model_validate({"event": "type", "features": FEATURES, "events": rules})


def meaning(log: pl.DataFrame, schema: Schema) -> list[tuple[Any, ...]]:
    """Label and weight of each row that is left."""
    found = check(None, None, log, schema).interactions
    return list(found.select("type", "__positive", *(["__weight"] if schema.weighted else [])).rows())


def test_four_lines_tell_what_events_mean(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text(SHOP)
    schema, config = load_config(tmp_path / "c.toml")
    assert schema is not None
    four = [("view", True, np.float32(0.2)), ("cart", True, 1), ("buy", True, 3), ("skip", False, 1)]
    assert meaning(LOG[:4], schema) == four
    (tmp_path / "again.toml").write_text(dump_config(schema, config))
    assert load_config(tmp_path / "again.toml")[0] == schema
    overridden, _ = load_config(tmp_path / "c.toml", ["schema.events.buy=5", "schema.events.view=negative"])
    assert overridden is not None
    assert meaning(LOG[:3], overridden) == [("view", False, 1), ("cart", True, 1), ("buy", True, 5)]


def test_ignored_events_are_left_out_and_inputs_are_no_targets() -> None:
    schema = events(
        **{"buy": {"weight": 2}, "skip": {"target": "negative", "weight": 0.5}, "play": "input", "*": "ignored"}
    )
    assert meaning(LOG, schema) == [("buy", True, 2), ("skip", False, 0.5), ("play", True, 0)]
    assert check(None, None, LOG, schema).notes == [
        "interactions: 3 of 6 rows are ignored events (others: 'cart' 1, 'ping' 1, 'view' 1); left out"
    ]
    plain = events(cart=1, skip="negative", **{"*": "ignored"})
    assert not plain.weighted
    assert meaning(LOG, plain) == [("cart", True), ("skip", False)]


def test_of_two_events_of_a_pair_the_last_is_kept_and_the_other_way_is_told() -> None:
    log = pl.concat([LOG[:3], LOG[2:3].with_columns(type=pl.lit("view"))])
    schema = events(view=0.2, cart=1, buy=3)
    assert [row[0] for row in meaning(log, schema)] == ["view", "cart", "view"]
    (note,) = check(None, None, log, schema).notes
    assert note.endswith("the last of each was kept, whatever its event; schema.duplicates = 'keep' keeps all")
    kept = schema.model_copy(update={"duplicates": "keep"})
    assert [row[0] for row in meaning(log, kept)] == ["view", "cart", "buy", "view"]


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        (
            {"view": 1, "buy": 1, "pign": 3, "zebra": "input", "*": "ignored"},
            [
                "4 of 6 rows are ignored events (others: 'cart' 1, 'ping' 1, 'play' 1, 'skip' 1); left out",
                "no row is of the event 'pign' of schema.events; did you mean 'ping'?",
                "no row is of the event 'zebra' of schema.events",
            ],
        ),
        ({"view": 1, "*": 0.5},
         ["5 of 6 rows are of other events (others: 'buy' 1, 'cart' 1, 'ping' 1, 'play' 1, 'skip' 1)"]),
        ({"*": 0.5},
         ["6 of 6 rows are of other events (others: 'buy' 1, 'cart' 1, 'ping' 1, 'play' 1, 'skip' 1, and 1 more)"]),
        ({"view": 1, "cart": 1, "buy": 3, "skip": 1, "ping": 1, "play": 1, "bye": 2}, []),
        ({"view": 1, "cart": 1, "buy": 3, "skip": 1, "ping": 1, "play": 1, "*": "ignored"}, []),
    ],
)  # fmt: skip
def test_types_of_the_rule_of_others_and_rules_without_rows_are_named(
    tmp_path: Path, rules: dict[str, Any], expected: list[str], prepared: bool, caplog: pytest.LogCaptureFixture
) -> None:
    schema = events(**rules)
    if prepared:
        data = shards(tmp_path / "in", schema, None, None, LOG, n=2)
        with caplog.at_level(logging.INFO, "twotower"):
            prepare.write_buckets(data, schema, tmp_path / "out", SMALL)
        notes = [m for m in caplog.messages if "other" in m or "no row" in m]
    else:
        notes = check(None, None, LOG, schema).notes
    assert notes == [f"interactions: {words}" for words in expected]


def test_ids_of_ignored_events_alone_are_no_users() -> None:
    found = check(None, None, LOG, events(view=1, cart=1, buy=1, skip=1, **{"*": "ignored"}))
    assert found.users["user_id"].to_list() == [1, 2]


def test_weights_of_a_column_and_of_events_are_multiplied() -> None:
    schema = events(buy=3, **{"*": 0.5}).model_copy(update={"weight": "n"})
    log = LOG.with_columns(n=pl.Series([1, 2, 2, 0, 4, 1]))
    assert [w for _, _, w in meaning(log, schema)] == [0.5, 1, 6, 0, 2, 0.5]


@pytest.mark.parametrize(
    "column",
    [
        pl.Series("type", [1, 2, 1]),
        pl.Series("type", ["1", "2", "1"]),
        pl.Series("type", ["1", "2", "1"], pl.Categorical),
    ],
    ids=str,
)
def test_types_may_be_numbers_text_or_categories(tmp_path: Path, column: pl.Series) -> None:
    log = LOG[:3].with_columns(column)
    schema = events(**{"1": 3, "2": "negative"})
    assert [(p, w) for _, p, w in meaning(log, schema)] == [(True, 3), (False, 1), (True, 3)]
    if column.dtype != pl.Categorical:
        log.write_csv(tmp_path / "log.csv")
        found = check(None, None, tmp_path / "log.csv", schema).interactions
        assert found["__weight"].to_list() == [3, 1, 3]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"events": {"view": 1, "bay": 3}},
         r"event 'type' holds 'buy', which schema.events does not name; did you mean 'bay'"),
        ({"events": {"view": 1}}, r"holds 'buy', .* \(named: view\); name it, or give all others a meaning by \"\*\""),
        ({"events": {"*": "ignored", "bye": 1}},
         r"all 6 rows are ignored events \(others: 'buy' 1, 'cart' 1, .*, and 1 more\)"),
        ({"event": "tipe", "events": {"*": 1}}, "no column 'tipe'; did you mean 'type'"),
        ({"event": "price", "events": {"*": 1}}, "event 'price' holds Float64, expected text or whole numbers"),
        ({"event": "gaps", "events": {"*": 1}}, "event 'gaps' has 1 missing values; fill them or drop the rows"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("prepared", [False, True])
def test_fault_G31_bad_events_are_one_line_and_leave_nothing(
    tmp_path: Path, given: dict[str, Any], words: str, prepared: bool
) -> None:
    schema = Schema.model_validate({"event": "type", "features": FEATURES} | given)
    log = LOG.with_columns(price=0.5, gaps=pl.Series(["a", "b", "c", None, "e", "f"]))
    data = shards(tmp_path / "in", schema, None, None, log, n=2)
    with one_line(DataError) as raised:
        if prepared:
            prepare.write_prepared(data, schema, SplitConfig(), tmp_path / "out", SMALL)
        else:
            check(None, None, log, schema)
    assert re.search(words, str(raised.value)), raised.value
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"events": {"view": 1e7}}, "schema.events.view.weight: input should be less than or equal to 1000000"),
        ({"events": {"view": 1e-9}}, "schema.events.view: weight is 1e-09, expected 0, or at least 1e-06"),
        ({"events": {"view": -1}}, "schema.events.view.weight: input should be greater than or equal to 0, got -1"),
        (
            {"events": {"view": "positiv"}},
            "schema.events.view.target: input should be 'positive', 'negative', 'input' or",
        ),
        ({"events": {"view": True}}, "schema.events.view: expected a weight, a target or both"),
        ({"events": {"view": {"wheight": 1}}}, "unknown key 'schema.events.view.wheight'; did you mean 'weight'"),
        ({"events": {"view": {"target": "input", "weight": 2}}}, "rows of the target 'input' have none; leave it out"),
        ({"events": {"view": "negative", "buy": 0}}, "no type of 'type' is a positive of a weight above 0"),
        ({"events": {}}, "no type of 'type' is a positive"),
        ({"event": "", "events": {"view": 1}}, "events needs event; name the event column"),
        ({"events": {"view": 1}, "label": "liked"}, "label and event both say which rows are positives"),
        ({"events": {"view": 1}, "event": "user_id"}, "user_id and event are both 'user_id'"),
    ],
)
def test_rules_that_mean_nothing_are_refused(given: dict[str, Any], words: str) -> None:
    with one_line(ConfigError, words):
        parse_config({"schema": {"event": "type", "features": FEATURES} | given})


SCHEMA = EVERYTHING_SCHEMA.model_copy(
    update={
        "label": "", "event": "what", "events": events(a=2, b="negative", c="input", d="ignored").events,
        "features": tuple(f for f in EVERYTHING_SCHEMA.features if f.name not in ("fans", "mean_stars")),
    }
)  # fmt: skip


def typed_tables() -> tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame]:
    """Tables whose rows are of four types, a third of them ignored."""
    users, items, actions = tables()
    types = np.random.default_rng(4).choice(["a", "b", "c", "d"], actions.height, p=[0.3, 0.2, 0.2, 0.3])
    return users, items, actions.with_columns(what=types)


def rows(data: Dataset) -> list[tuple[Any, ...]]:
    return sorted(zip(*(c.tolist() for c in (*data.pairs.arrays.values(), data.parts)), strict=True))


@pytest.mark.parametrize("kind", ["time", "last"])
def test_prepared_events_are_those_of_memory_and_of_a_label_with_weights(tmp_path: Path, kind: str) -> None:
    frames, split = typed_tables(), SplitConfig(kind=kind)
    memory = in_memory(*frames, SCHEMA, split)
    data = shards(tmp_path / "in", SCHEMA, *frames)
    disk = prepare.write_prepared(data, SCHEMA, split, tmp_path / "out", SMALL)
    assert rows(disk) == rows(memory)
    users, items, actions = frames
    plain = actions.filter(pl.col("what") != "d").with_columns(
        liked=pl.col("what") != "b", n=pl.col("what").replace_strict({"a": 2, "b": 1, "c": 0})
    )
    same = SCHEMA.model_copy(update={"event": "", "events": {}, "label": "liked", "weight": "n", "positive_above": 0})
    assert rows(in_memory(users, items, plain, same, split)) == rows(memory)


def test_buckets_of_other_events_are_refused(tmp_path: Path) -> None:
    data = shards(tmp_path / "in", SCHEMA, *typed_tables())
    buckets = prepare.write_buckets(data, SCHEMA, tmp_path / "buckets", SMALL)
    assert check_buckets(buckets.folder, SCHEMA) == []
    given, split = DataConfig(buckets=str(buckets.folder)), SplitConfig(kind="last")
    again = prepare.write_prepared(given, SCHEMA, split, tmp_path / "again", SMALL)
    assert again.digest == prepare.write_prepared(data, SCHEMA, split, tmp_path / "out", SMALL).digest
    other = SCHEMA.model_copy(update={"events": SCHEMA.events | events(a=3).events})
    with pytest.raises(ConfigError, match="the buckets were written for another schema .log.events"):
        prepare.write_prepared(given, other, split, tmp_path / "other", SMALL)


def test_a_log_without_known_positives_has_nothing_to_learn(tmp_path: Path) -> None:
    schema = events(buy=3, **{"*": "negative"})
    log = LOG.filter(pl.col("type") != "buy")
    with pytest.raises(DataError, match="no positive interaction of a weight above 0 in the train part"):
        build_dataset(check(None, None, log, schema), schema, SplitConfig())
    data = shards(tmp_path / "in", schema, None, None, log, n=2)
    with pytest.raises(DataError, match="no positive interaction of a weight above 0"):
        prepare.write_prepared(data, schema, SplitConfig(), tmp_path / "out", SMALL)
