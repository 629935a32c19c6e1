"""Recipes with the columns of other tables in place of their own."""

from __future__ import annotations

from typing import Any

import pytest

from twotower.config.toml import parse_config
from twotower.errors import ConfigError
from twotower.suggestion.features import SideFeature
from twotower.suggestion.recipes import FittedRecipe, Settings, read_recipe, recipe_names
from twotower.suggestion.shape import RULES

IDS = {"user": "customer", "item": "product"}
RECIPE: Settings = {
    "schema": {
        "label": "rating",
        "features": [
            {"kind": "categorical", "side": "user", "name": "user_id"},
            {"kind": "categorical", "side": "user", "name": "city", "min_count": 3},
            {"kind": "sequence", "side": "user", "name": "liked", "interactions": "positive", "share_embedding": False},
            {"kind": "categorical", "side": "item", "name": "item_id"},
            {"kind": "multi_hot", "side": "item", "name": "genres"},
            {"kind": "categorical", "side": "item", "name": "brand"},
        ],
        "time": "at",
    },
    "model": {
        "width": 8,
        "pairs": [
            {
                "user": {"fields": ["city", "liked"], "layers": [8]},
                "item": {"fields": ["item_id", "genres", "brand"]},
            },
            {"user": {"fields": ["user_id"]}, "item": {"fields": ["brand"]}},
        ],
    },
}


def column(name: str, side: str = "item", kind: str = "categorical", **options: str) -> SideFeature:
    return SideFeature(name, {"kind": kind, "side": side, "name": name, **options}, f"why {name}")


def fitted(*columns: SideFeature, has_label: bool = True) -> FittedRecipe:
    return FittedRecipe(RECIPE, IDS, columns, has_label)


def pairs(recipe: FittedRecipe) -> Any:
    return recipe.model["pairs"]


def names(recipe: FittedRecipe, side: str) -> list[object]:
    return [f["name"] for f in recipe.features if f["side"] == side]


def test_ids_and_histories_stay_and_columns_are_replaced() -> None:
    found = fitted(column("plan", "user"), column("colour"), column("size", kind="numeric"))
    assert names(found, "user") == ["customer", "plan", "liked"]
    assert names(found, "item") == ["product", "colour", "size"]
    assert found.comments["schema.features.1"] == "why plan"


def test_fields_name_what_replaces_theirs() -> None:
    first, second = pairs(fitted(column("plan", "user"), column("colour"), column("size")))
    assert first["user"] == {"fields": ["plan", "liked"], "layers": [8]}
    assert first["item"] == {"fields": ["product", "colour", "size"]}
    assert (second["user"], second["item"]) == ({"fields": ["customer"]}, {})


def test_without_columns_their_fields_are_left_out() -> None:
    first, _ = pairs(fitted())
    assert first["user"]["fields"] == ["liked"]
    assert first["item"]["fields"] == ["product"]


def test_a_kind_keeps_the_options_that_the_recipe_gives_it() -> None:
    plan, tags = column("plan", "user"), column("tags", kind="multi_hot", separator="|")
    found = fitted(plan, tags).features
    assert {"kind": "categorical", "side": "user", "name": "plan", "min_count": 3} in found
    assert {"kind": "multi_hot", "side": "item", "name": "tags", "separator": "|"} in found


def test_names_that_meet_a_history_are_told_apart() -> None:
    found = fitted(column("liked", "user"))
    assert names(found, "user") == ["customer", "liked", "liked_history"]


def test_text_is_read_by_recipes_of_text() -> None:
    assert names(fitted(column("about", kind="text")), "item") == ["product"]
    both = [column("about", kind="text"), column("brand"), column("says", "user", "text")]
    assert names(FittedRecipe(RECIPE, {"user": "c", "item": "p"}, both, True), "item") == ["p", "brand"]
    read = FittedRecipe(RECIPE, {"user": "c", "item": "p"}, both, True, reads_text=True)
    assert names(read, "item") == ["p", "about", "brand"]
    assert "says" not in names(read, "user")


@pytest.mark.parametrize("name", ["cold-start", "sequence-short"])
def test_columns_of_users_are_read_by_the_trained_pairs_of_most_fields(name: str) -> None:
    columns = [column("city", "user"), column("brand")]
    found = FittedRecipe(read_recipe(name), {"user": "c", "item": "p"}, columns, False, of_users=["city"])
    pairs: Any = found.model["pairs"]
    read = [pair for pair in pairs if "city" in pair["user"]["fields"]]
    assert read
    assert {len(pair["user"]["fields"]) for pair in pairs if pair not in read} <= {len(read[0]["user"]["fields"]) - 2}
    assert sum(f["name"] == "city" for f in found.features) == 1
    for pair in read:
        user, item = pair["user"], pair["item"]
        assert (user.get("join") == "sum" and user["layers"] == []) == (item.get("join") == "sum"), "as the items"


def test_a_recipe_that_is_not_installed_is_told() -> None:
    with pytest.raises(ConfigError, match=r"holds no sequence\.toml; install the wheel"):
        read_recipe("sequence")


def test_the_recipes_are_those_of_the_rules_and_configs() -> None:
    assert recipe_names() == sorted(rule.recipe for rule in RULES)


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_is_a_config_of_movielens(name: str) -> None:
    _, config = parse_config(read_recipe(name))
    assert config.data.dataset
    assert config.data.dataset.kind.startswith("ml-1m")
