"""Starts that do not go with the tables: a config of `suggest` that gets versions of items or a context, and the way
out of its error."""

from __future__ import annotations

import re
import tomllib
from typing import Any

import polars as pl
import pytest
from suggestion_worlds import log

import twotower
from twotower.config.reference import toml_value
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


def without(settings: Settings, advice: str) -> Settings:
    """Return settings without the entries that an advice names, and with what it sets."""
    starts = [int(n) for n in re.findall(r"train\.start\.(\d+)", advice)]
    pairs = [int(n) for n in re.findall(r"model\.pairs\.(\d+)", advice)]
    features = re.findall(r"'(\w+)'", advice.partition("the feature")[2].partition(", name pair")[0])
    train, model, schema = (dict(settings[key]) for key in ("train", "model", "schema"))
    named = {kind: int(n) for n, kind in re.findall(r"name pair (\d+) in the start of kind '(\w+)'", advice)}
    train["start"] = [
        {**s, **({"pair": named[s["kind"]]} if s["kind"] in named else {})}
        for place, s in enumerate(train["start"])
        if place not in starts
    ]
    if "train.pairs = 'together'" in advice:
        train["pairs"] = "together"
    model["pairs"] = [pair for place, pair in enumerate(model["pairs"]) if place not in pairs]
    schema["features"] = [f for f in schema["features"] if f["name"] not in features]
    return {**settings, "train": train, "model": model, "schema": schema}


def refused(settings: Settings) -> str:
    with pytest.raises(ConfigError) as found:
        trained(settings)
    return str(found.value)


@pytest.mark.parametrize(
    ("recipe", "what", "named"),
    [
        ("cold-start", "versions", "leave out train.start.0, train.start.1, model.pairs.1, model.pairs.2 and the "
            "features 'tastes' and 'contents', or"),
        ("cold-start", "context", "leave out train.start.0, train.start.1, model.pairs.1, model.pairs.2 and the "
            "features 'tastes' and 'contents', or"),
        ("sequence-short", "versions", "leave out train.start.0, train.start.1, train.start.2, model.pairs.4, "
            "model.pairs.5, model.pairs.6 and the features 'tastes', 'recent', 'contents' and 'tag', or"),
        ("sequence-short", "context", "leave out train.start.0, train.start.1, train.start.2, model.pairs.4, "
            "model.pairs.5, model.pairs.6 and the features 'tastes', 'recent', 'contents' and 'tag', or"),
        ("sequence-long", "versions", "leave out train.start.0, train.start.1, train.start.2, model.pairs.2, "
            "model.pairs.3, model.pairs.4 and the features 'recent', 'taken', 'contents' and 'tag', or"),
    ],
)  # fmt: skip
def test_the_entries_that_an_error_names_are_all_that_stands_in_the_way(recipe: str, what: str, named: str) -> None:
    settings = changed(suggested(recipe), what)
    message = refused(settings)
    assert named in message
    either = "leave out schema.valid_from" if what == "versions" else "leave out the feature 'device' of the context"
    assert message.endswith(either)
    left = without(settings, message.partition("leave out ")[2].partition(", or leave out")[0])
    assert not left["train"]["start"]
    assert any(name.startswith("test.") for name in trained(left))


def test_a_scale_stands_in_place_of_a_weight_beside_a_context() -> None:
    settings = changed(suggested("cold-start"), "context")
    assert "give scale in its place, or" in refused(settings)
    start, other = settings["train"]["start"]
    scaled = {k: v for k, v in start.items() if k != "blend"} | {"scale": 0.1}
    left = without(settings, f"train.start.1, model.pairs.{other['pair']} and the feature 'contents'")
    assert trained({**left, "train": {**left["train"], "start": [scaled]}})


def test_starts_that_stay_are_told_their_numbers() -> None:
    settings = changed(suggested("sequence-short"), "context")
    first, second, third = settings["train"]["start"]
    kept = {k: v for k, v in second.items() if k != "blend"} | {"scale": 0.1}
    settings["train"]["start"] = [first, kept, third]
    message = refused(settings)
    advice = message.partition("leave out ")[2].partition(", or leave out")[0]
    assert (
        advice
        == "train.start.0, train.start.2, model.pairs.4, model.pairs.6 and the features 'tastes', 'contents' and "
        f"'tag', name pair 4 in the start of kind '{second['kind']}'"
    )
    assert trained(without(settings, advice))


def test_one_pair_that_stays_is_not_trained_apart() -> None:
    settings = suggested("sequence-short")
    settings["model"]["pairs"] = [settings["model"]["pairs"][place] for place in (0, 4)]
    settings["train"]["start"] = [{**settings["train"]["start"][0], "pair": 1}]
    settings = changed(settings, "versions")
    message = refused(settings)
    assert ", set train.pairs = 'together', or leave out schema.valid_from" in message
    assert trained(without(settings, message.partition("leave out ")[2].partition(", or leave out")[0]))


def test_a_feature_that_others_read_stays() -> None:
    settings = suggested("cold-start")
    settings["model"]["pairs"][0]["user"]["fields"].append("tastes")
    told = "leave out train.start.0, train.start.1, model.pairs.1, model.pairs.2 and the feature 'contents', or"
    assert told in refused(changed(settings, "versions"))


def test_a_start_that_is_trained_on_goes_and_its_pair_stays() -> None:
    settings = suggested("cold-start")
    first, other = settings["train"]["start"]
    settings = without(settings, f"train.start.1, model.pairs.{other['pair']} and the feature 'contents'")
    settings["train"]["start"] = [{"kind": first["kind"], "pair": first["pair"]}]
    message = refused(changed(settings, "versions"))
    assert message.endswith("; leave out train.start.0, or leave out schema.valid_from")
    assert trained(without(changed(settings, "versions"), "train.start.0"))


def test_closed_forms_alone_are_told_what_else_to_use() -> None:
    message = refused(changed(suggested("collaborative"), "versions"))
    assert "leave out schema.valid_from, or use a recipe that is trained: cold-start" in message
    assert trained(changed(suggested("collaborative"), "context"))


@pytest.mark.parametrize("recipe", ["cold-start", "sequence-long", "sequence-short"])
def test_suggest_leaves_out_what_does_not_go_with_versions(recipe: str) -> None:
    _, items, actions = world()
    found = suggest(actions, items=items, recipe=recipe, overrides=["schema.valid_from=since"])
    assert not found.config.train.start
    assert "no closed form goes with the versions of items" in found.text.replace("\n#", "")
    assert not {"tastes", "recent", "taken"} & {f.name for f in found.schema.features}
    text = tomllib.loads(found.text)
    text["train"] |= {"epochs": 1, "device": "cpu", "precision": "fp32"}
    assert trained(text)


def test_suggest_says_what_else_to_use_than_closed_forms_alone() -> None:
    _, items, actions = world()
    said = "leave schema.valid_from out, or ask for .*: cold-start,"
    with pytest.raises(ConfigError, match=rf"recipe` collaborative: .*{said}"):
        suggest(actions, items=items, recipe="collaborative", overrides=["schema.valid_from=since"])
    unordered = log(length=8, strength=0.0)
    assert suggest(unordered, items=items.unique("item_id").drop("since")).recipe == "collaborative"
    with pytest.raises(ConfigError, match=rf"^the rules choose the recipe collaborative, which has .*{said}"):
        suggest(unordered, items=items, overrides=["schema.valid_from=since"])


def test_suggest_weighs_no_pair_beside_a_context_that_is_given() -> None:
    _, _, actions = world()
    features = [
        f for f in suggested("sequence-short")["schema"]["features"] if f["name"] in ("means", "order", "item_id")
    ]
    given = f"schema.features=[{', '.join(map(toml_value, [*features, DEVICE]))}]"
    found = suggest(actions, recipe="sequence-short", overrides=[given])
    assert not found.config.train.start
    assert "the vectors of trained pairs depend on the context" in found.text.replace("\n#", "")
    assert suggest(actions, recipe="collaborative", overrides=["schema.time="]).config.train.start
    text = tomllib.loads(found.text)
    text["train"] |= {"epochs": 1, "device": "cpu", "precision": "fp32"}
    assert trained(text)
