"""Scorers of a config, as the features, pairs, starts and options of the model that stand for them."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from mykinds.scorers import Together
from worlds import REPLAYED_SCHEMA, replayed

from twotower import api
from twotower.config.experiment import Config
from twotower.config.scorers import with_scorers
from twotower.config.toml import dump_config, parse_config
from twotower.data.dataset import Dataset, build_dataset
from twotower.data.split import SplitConfig
from twotower.data.tables import check
from twotower.errors import ConfigError
from twotower.features.schema import Schema
from twotower.scorers import SCORERS, AddedScorer, Repeats, Trending
from twotower.train.defaults import with_defaults

COLUMNS: list[dict[str, Any]] = [
    {"kind": "categorical", "side": "user", "name": "city"},
    {"kind": "numeric", "side": "user", "name": "age"},
    {"kind": "categorical", "side": "item", "name": "brand"},
    {"kind": "numeric", "side": "item", "name": "price", "buckets": 4},
    {"kind": "text", "side": "item", "name": "about"},
]
IDS: list[dict[str, Any]] = [{"kind": "categorical", "side": s, "name": f"{s}_id"} for s in ("user", "item")]
OWN = {"kind": "sequence", "side": "user", "name": "own"}


def parsed(
    *scorers: Any,
    features: Iterable[dict[str, Any]] = (*IDS, *COLUMNS, OWN),
    epochs: int = 1,
    schema: dict[str, Any] | None = None,
    **sections: Any,
) -> tuple[Schema, Config]:
    """Return the schema and the config that scorers make."""
    body = {"scorers": [*scorers], "train": {"epochs": epochs}, "model": {"similarity": "dot"}} | sections
    found, config = parse_config({**body, "schema": {"features": [*features], **(schema or {})}})
    assert found is not None
    return found, config


def added(schema: Schema) -> dict[str, tuple[str, str]]:
    """Return the pooling of each added history, and which interactions it holds."""
    return {f.name: (f.pools.kind, f.history.interactions) for f in schema.features
            if f.name.startswith("__") and f.history and f.pools}  # fmt: skip


LABEL, TIME = {"label": "stars", "positive_above": 3}, {"time": "at"}


@pytest.mark.parametrize(
    ("kind", "schema", "histories", "user", "item"),
    [
        ("ials", {}, {"__ials": "ridge"}, ("__ials",), ("item_id",)),
        ("slit", TIME, {"__slit": "decay"}, ("__slit",), ("item_id",)),
        ("transitions", TIME, {"__transitions": "decay"}, ("__transitions",), ("item_id",)),
        ("ease", {}, {"__ease": "sum"}, ("__ease",), ("item_id",)),
        ("ease", LABEL, {"__ease": "sum", "__ease_negatives": "sum"}, ("__ease", "__ease_negatives"), ("item_id",)),
        ("columns", {}, {"__columns": "mean"}, ("__columns",), ("brand", "price")),
        ("columns", TIME, {"__columns": "decay"}, ("__columns",), ("brand", "price")),
    ],
)
def test_a_closed_form_is_a_pair_that_reads_what_the_schema_has(
    kind: str, schema: dict[str, Any], histories: dict[str, str], user: tuple[str, ...], item: tuple[str, ...]
) -> None:
    before, plain = parsed(schema=schema)
    found, config = parsed({"kind": kind, "width": 12}, schema=schema)
    of_negatives = {name: "negative" if name.endswith("negatives") else "positive" for name in histories}
    assert added(found) == {name: (pooling, of_negatives[name]) for name, pooling in histories.items()}
    assert found.features[: len(before.features)] == before.features
    trained, pair = config.model.pairs
    assert (pair.user.fields, pair.item.fields) == (user, item)
    pieces = 2 if kind == "columns" and schema is TIME else 1
    assert pair.user.width == 12
    assert pair.item.width in ((12 * pieces,) if kind != "slit" else range(12, 13 * 12, 12))
    assert [(pair, form.kind) for pair, form in config.solved.items()] == [(1, kind)]
    for side in ("user", "item"):  # as without scorers
        names = tuple(f.name for f in before.tower(side))
        assert (trained.user if side == "user" else trained.item).fields == names
    assert plain.model.pairs[0].user.fields == ()
    assert parse_config(tomllib.loads(dump_config(found, config))) == (found, config)


@pytest.mark.parametrize("kind", [*SCORERS, Together])
def test_each_kind_adds_to_trained_towers_what_a_written_config_holds(kind: type[AddedScorer]) -> None:
    found, config = parsed(kind.kind, schema=LABEL | TIME)
    assert len(config.train.solved) + len(config.terms) == 1
    assert config.scorers == (*config.terms,)
    assert parse_config(tomllib.loads(dump_config(found, config))) == (found, config)


def test_repeats_and_trending_stay_scorers() -> None:
    found, config = parsed("repeats", "trending", schema=TIME)
    assert config.scorers == (Repeats(history="__repeats"), Trending())
    assert added(found)["__repeats"][1] == "positive"
    assert len(config.model.pairs) == 1
    assert "__repeats" not in config.model.pairs[0].user.fields
    assert parse_config(tomllib.loads(dump_config(found, config))) == (found, config)


def test_without_epochs_no_tower_is_trained_and_unread_histories_go() -> None:
    found, config = parsed("ials", "repeats", epochs=0)
    assert [pair.user.fields for pair in config.model.pairs] == [("__ials",)]
    assert {f.name for f in found.features if f.history} == {"__ials", "__repeats"}
    assert {f.name for f in found.features} >= {"user_id", "city", "brand"}
    kept, _ = parsed("ials", {"kind": "repeats", "history": "own"}, epochs=0)
    assert "own" in {f.name for f in kept.features}


def test_two_scorers_of_a_kind_are_two_pairs() -> None:
    found, config = parsed({"kind": "ials", "width": 8}, "ease", {"kind": "ials", "width": 16})
    assert [pair.user.fields for pair in config.model.pairs[1:]] == [("__ials",), ("__ease",), ("__ials_2",)]
    assert [pair.user.width for pair in config.model.pairs[1:]] == [8, 128, 16]
    assert {*added(found)} == {"__ials", "__ease", "__ials_2"}


def test_ease_reads_no_negatives_on_request() -> None:
    found, _ = parsed({"kind": "ease", "unliked": 0}, schema=LABEL)
    assert {*added(found)} == {"__ease"}


@pytest.mark.parametrize(
    ("scorers", "more", "message"),
    [
        (["columns"], {"features": IDS}, "'columns' reads columns of the items"),
        (["ials"], {"features": COLUMNS}, "'ials' reads the id of the items"),
        (["slit"], {}, "'slit' reads what follows what, and schema.time is empty"),
        (["repeats"], {"epochs": 0}, "train.epochs = 0 trains no tower"),
        (["ials"], {"epochs": 0, "model": {"pairs": [{}]}}, "trains no tower, and model.pairs has some"),
        (["repeats", "repeats"], {}, "names 'repeats' twice"),
        (["trending", "trending"], {}, "names 'trending' twice"),
        (["ials"], {"train": {"embedding_placement": "torchrec"}}, "replicated"),
        (["bm25"], {}, "no scorer of kind 'bm25'"),
    ],
)
def test_scorers_that_do_not_go_are_refused(scorers: list[Any], more: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parsed(*scorers, **more)


def test_defaults_follow_the_data_with_scorers_as_without(tables: Dataset) -> None:
    """A closed form does not mark options as set."""
    found = with_scorers(tables.schema, Config.model_validate({"scorers": ["ials"]}))[1]
    assert [source.kind for source in with_defaults(found, tables).negatives.pairs] == ["random"]


@pytest.fixture
def tables() -> Dataset:
    schema = Schema.model_validate({"time": "at", "time_unit": "order", "features": [*IDS, OWN]})
    return build_dataset(check(None, None, replayed(), schema), schema, SplitConfig(kind="time"))


def test_prepared_data_train_as_tables_do(tmp_path: Path) -> None:
    rows = replayed()
    rows.write_parquet(tmp_path / "rows.parquet")
    config = Config.model_validate(
        {
            "scorers": [{"kind": "ease", "width": 64, "regularization": [40.0]}, "repeats"],
            "data": {"interactions": str(tmp_path / "rows.parquet")},
            "split": {"kind": "time"},
            "model": {"similarity": "dot"},
            "train": {"epochs": 0, "monitor": "validation.recall@5"},
            "evaluation": {"k": [5], "repeats": "allow", "bootstrap": 0},
        }
    )
    prepared = api.prepare_folder(config, REPLAYED_SCHEMA, tmp_path / "prepared")
    of_tables = api.fit((None, None, rows), REPLAYED_SCHEMA, config)
    assert of_tables.model.terms["repeats"].is_fitted
    for schema in (REPLAYED_SCHEMA, None):
        run = api.fit(prepared, schema, config)
        assert run.dataset.schema.features == of_tables.dataset.schema.features
        assert run.config.model == of_tables.config.model
        assert run.metrics["test.recall@5"] == pytest.approx(of_tables.metrics["test.recall@5"], abs=1e-6)
