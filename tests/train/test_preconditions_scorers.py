"""Scorers that do not go with the tables: a config of `suggest` that gets versions of items or a context."""

from __future__ import annotations

import tomllib
from typing import Any

import polars as pl
import pytest
from suggestion_worlds import log

import twotower
from twotower.config.toml import parse_config
from twotower.errors import ConfigError
from twotower.suggestion.suggest import suggest

Settings = dict[str, Any]
DEVICE = {"kind": "categorical", "side": "context", "name": "device"}


def world() -> tuple[None, pl.DataFrame, pl.DataFrame]:
    """Return a log with a device of each row, and items of which half have a second version."""
    actions = log(length=8)
    actions = actions.with_columns(
        device=pl.Series([["web", "app", "tv"][(i + i // 60) % 3] for i in range(actions.height)])
    )
    ids, middle = range(40), int(actions["timestamp"].median())  # type: ignore[arg-type]
    first = pl.DataFrame({"item_id": ids, "tag": [f"t{i % 5}" for i in ids]}).with_columns(since=pl.lit(None, pl.Int64))
    return None, pl.concat([first, first[::2].with_columns(since=pl.lit(middle, pl.Int64))]), actions


def suggested(recipe: str) -> Settings:
    """Return a config that `suggest` writes for the first versions, of one quick epoch if it has any."""
    _, items, actions = world()
    found = suggest(actions, items=items.filter(pl.col("since").is_null()).drop("since"), recipe=recipe)
    settings = tomllib.loads(found.text)
    epochs = min(1, settings["train"]["epochs"])
    settings["train"] |= {"epochs": epochs, "device": "cpu", "precision": "fp32"}
    settings["evaluation"] = settings.get("evaluation", {}) | {"bootstrap": 0}
    return settings


def trained(settings: Settings) -> dict[str, float]:
    schema, config = parse_config(settings)
    assert schema is not None
    return dict(twotower.fit(world(), schema, config).metrics)


def changed(settings: Settings, what: str) -> Settings:
    """Return settings to which a user has added versions, or a feature of the context."""
    schema = dict(settings["schema"])
    if what == "versions":
        schema["valid_from"] = "since"
    else:
        schema["features"] = [*schema["features"], DEVICE]
    return {**settings, "schema": schema}


def without_scorers(settings: Settings) -> Settings:
    return {key: value for key, value in settings.items() if key != "scorers"}


def refused(settings: Settings) -> str:
    with pytest.raises(ConfigError) as found:
        trained(settings)
    return str(found.value)


@pytest.mark.parametrize(
    ("recipe", "what"),
    [
        ("cold-start", "versions"),
        ("cold-start", "context"),
        ("sequence-short", "versions"),
        ("sequence-short", "context"),
        ("sequence-long", "versions"),
    ],
)
def test_without_the_scorers_that_an_error_names_the_training_runs(recipe: str, what: str) -> None:
    settings = changed(suggested(recipe), what)
    assert settings["scorers"]
    assert "leave it out of scorers, or leave out " in refused(settings)
    assert any(name.startswith("test.") for name in trained(without_scorers(settings)))


def test_scorers_need_a_validation_part() -> None:
    settings = suggested("sequence-short")
    settings["split"] = {**settings.get("split", {}), "validation": 0}
    del settings["train"]["patience"]
    assert "is fitted to the validation part, and the split has none; leave it out of scorers" in refused(settings)
    settings = without_scorers(settings)
    assert "narrow.width = 'auto' is chosen on the validation part, and the split has none" in refused(settings)
    assert trained({**settings, "narrow": {"width": 16}})


def test_an_error_of_scorers_alone_names_recipes_that_are_trained() -> None:
    message = refused(changed(suggested("collaborative"), "versions"))
    assert "leave out schema.valid_from, or use a recipe that is trained: cold-start" in message
    assert trained(changed(suggested("collaborative"), "context"))
