"""Suggestions on made worlds: each threshold from either side, configs that train, and what they say."""

from __future__ import annotations

import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from suggestion_worlds import log, queries, sessions, with_columns, with_label, with_new_items
from waves import waves

import twotower
from twotower.config.experiment import Config
from twotower.config.toml import load_config, override_config, parse_config
from twotower.data.dataset import build_dataset
from twotower.data.source import read
from twotower.data.split import SplitConfig
from twotower.data.tables import Tables, check
from twotower.errors import ConfigError, DataError, OpenRoles
from twotower.features.field import MEAN, PoolingSpec
from twotower.features.schema import Schema
from twotower.suggestion.features import SideFeature
from twotower.suggestion.recipes import FittedRecipe, Settings, read_recipe
from twotower.suggestion.shape import MIN_LONG, RULES, repeated_share
from twotower.suggestion.suggest import Suggestion, suggest
from twotower.train.trainer import Trainer

World = tuple[pl.DataFrame | None, pl.DataFrame | None, pl.DataFrame]


def adds(found: Suggestion, kind: str) -> bool:
    """Return True if a suggested config has a scorer without a pair of towers."""
    return kind in [term.kind for term in found.config.terms]


def worlds() -> dict[str, World]:
    """Return a world for each recipe."""
    actions, items = with_new_items(log(), 0.5)
    return {
        "words": queries(),
        "ranking": (None, None, with_label(log(), 0.3)),
        "cold-start": (None, items, actions),
        "sequence-long": (None, None, log(length=60, n_items=200).unique(["user_id", "item_id"], maintain_order=True)),
        "sequence-short": (None, None, log(length=8)),
        "collaborative": (None, None, log(strength=0.0).drop("timestamp")),
    }


def of(tables: World, **options: str) -> Suggestion:
    users, items, actions = tables
    return suggest(actions, users, items, **options)


def of_one_epoch(config: Config) -> Config:
    return override_config(
        config,
        [
            f"train.epochs={min(1, config.train.epochs)}",
            "train.precision=fp32",
            "evaluation.bootstrap=0",
            "train.device=cpu",
        ],
    )


@pytest.mark.parametrize("name", [rule.recipe for rule in RULES])
def test_each_shape_has_its_recipe_whose_config_trains(name: str) -> None:
    tables = worlds()[name]
    found = of(tables)
    assert found.recipe == name
    run = twotower.fit(tables, found.schema, of_one_epoch(found.config))
    assert np.isfinite([value for metric, value in run.metrics.items() if metric.startswith("test.")]).any()


@pytest.mark.parametrize(
    ("name", "dislikes"),
    [
        (rule.recipe, dislikes)
        for rule in RULES
        for dislikes in (False, True)
        if rule.recipe != "ranking" or not dislikes
    ],
)
def test_each_recipe_may_train_on_its_shape_and_beside_a_few_dislikes(name: str, dislikes: bool) -> None:
    users, items, actions = worlds()[name]
    actions = with_label(actions, 0.02) if dislikes else actions
    found = of((users, items, actions), recipe=name)
    data = build_dataset(check(users, items, actions, found.schema), found.schema, found.config.split)
    Trainer(data, found.config)


@pytest.mark.parametrize("name", [rule.recipe for rule in RULES])
def test_the_text_is_the_config_and_says_why(name: str) -> None:
    found = of(worlds()[name])
    written = tomllib.loads(found.text)
    assert written["schema"]["user_id"] == found.schema.user_id
    assert found.text.startswith(f"# Recipe {name}: ")
    assert f"# {name}? yes: " in found.text
    before = [rule.recipe for rule in RULES][: [rule.recipe for rule in RULES].index(name)]
    assert all(f"# {other}? no: " in found.text for other in before)


def test_a_shape_has_what_its_world_was_made_with() -> None:
    """The thresholds on it are those of test_shape."""
    distinct = log(n_users=100, length=MIN_LONG, n_items=2000).unique(["user_id", "item_id"], maintain_order=True)
    assert of((None, None, distinct)).shape.length == MIN_LONG
    for share in (0.0, 0.05, 0.95):
        assert of((None, None, with_label(distinct, share))).shape.negatives == pytest.approx(share, abs=1e-3)
    for share, recipe in ((0.0, "sequence-short"), (0.2, "cold-start"), (0.9, "cold-start")):
        actions, items = with_new_items(log(n_users=100, length=10, n_items=40), share)
        found = of((None, items, actions))
        assert found.recipe == recipe
        assert found.shape.new_items == pytest.approx(share, abs=0.02)
    users, items, actions = queries(5)
    assert of((users, items, actions)).shape.length <= 5


@pytest.mark.parametrize(
    ("share", "each", "recipe"), [(0.3, 2, "collaborative"), (0.6, 2, "cold-start"), (0.9, 11, "collaborative")]
)
def test_columns_of_users_decide_where_they_tell_and_histories_are_short(share: float, each: int, recipe: str) -> None:
    actions, users = with_columns(share, each)
    assert suggest(actions, users).recipe == recipe


def test_a_scale_rates_what_users_took() -> None:
    actions = with_label(log(), 0.4, scale=6)
    found = of((None, None, actions))
    assert (found.recipe, found.schema.label, found.shape.label_values) == ("sequence-short", "", 6)
    assert "The label 'rating' is not read" in found.text
    asked = of((None, None, actions), recipe="ranking")
    assert (asked.schema.label, asked.schema.positive_above) == ("rating", 4)
    assert "the rules choose sequence-short" in asked.text


def test_a_label_that_is_asked_for_is_read_whatever_the_recipe() -> None:
    scale = np.repeat([1, 2, 3, 4, 5], [1, 1, 4, 5, 13])
    actions = log().with_columns(rating=pl.Series(scale[np.arange(log().height) % len(scale)])).drop("timestamp")
    asked = suggest(actions, overrides=["schema.label=rating"])
    assert (asked.recipe, asked.schema.label, asked.schema.positive_above) == ("collaborative", "rating", 3)
    assert asked.schema.histories()[0].interactions == "positive"
    Trainer(build_dataset(check(None, None, actions, asked.schema), asked.schema, asked.config.split), asked.config)
    half = suggest(with_label(log(), 0.4, scale=6), overrides=["schema.positive_above=4"])
    assert (half.recipe, half.schema.label, half.schema.positive_above) == ("sequence-short", "rating", 4)


def test_a_label_apart_is_asked_about_and_taken_for_a_refusal_if_it_is_given() -> None:
    scale = np.repeat([-1, 1, 2, 3, 4, 5], [9, 1, 1, 4, 5, 13])
    actions = log().with_columns(rating=pl.Series(scale[np.arange(log().height) % len(scale)]))
    with pytest.raises(OpenRoles, match="-1 may be a refusal, or no rating"):
        suggest(actions)
    found = suggest(actions, label="rating")
    assert (found.recipe, found.schema.label, found.schema.positive_above) == ("ranking", "rating", 0)


def test_a_scale_with_negatives_tells_what_users_refused() -> None:
    actions = log()
    actions = actions.with_columns(rating=pl.Series([(-1, 0, 1, 1)[i % 4] for i in range(actions.height)]))
    found = of((None, None, actions))
    assert (found.recipe, found.schema.label, found.schema.positive_above) == ("ranking", "rating", 0)
    assert found.shape.taken / found.shape.interactions == pytest.approx(0.5, abs=0.02)
    asked = of((None, None, actions), recipe="sequence-short")
    assert (asked.schema.label, asked.schema.positive_above) == ("rating", 0)


def test_new_items_are_tested_by_time_and_by_text_where_they_have_nothing_else() -> None:
    actions, items = with_new_items(log(n_users=100, length=10), 0.5)
    found = of((None, items, actions))
    assert found.config.split.kind == "time"
    texts = items.select("item_id", title=pl.format("thing number {}", "item_id"))
    found = of((None, texts, actions))
    assert found.recipe == "cold-start"
    assert [f.source for f in found.schema.side("item")] == ["item_id", "title"]


@pytest.mark.parametrize("price", [True, False])
def test_text_is_read_where_other_columns_are_the_same_for_several_new_items(price: bool) -> None:
    actions, items = with_new_items(log(), 0.5)
    about = [
        f"story of {a} and {b}" for a, b in zip(range(100, 100 + len(items)), "abcdefg" * len(items), strict=False)
    ]
    items = items.with_columns(about=pl.Series(about))
    found = of((None, items if price else items.drop("price"), actions))
    assert found.recipe == "cold-start"
    names = [f.name for f in found.schema.features if f.side == "item"]
    assert ("about" in names) != price, "four categories, with a price 64 combinations"


@pytest.mark.parametrize(
    ("single", "has_text", "recipe"),
    [
        (0, True, "collaborative"),
        (143, True, "collaborative"),
        (144, True, "cold-start"),
        (144, False, "collaborative"),
    ],
)
@pytest.mark.parametrize("unused", [0, 40])
def test_without_times_rows_of_items_without_another_row_are_the_new_ones(
    single: int, unused: int, has_text: bool, recipe: str
) -> None:
    """Whatever the catalogue holds beside them. Without text the pair that reads columns ranks them."""
    users, items = np.divmod(np.arange(720), 12)
    alone = np.random.default_rng(1).permutation(720) < single
    taken = np.where(alone, 100 + np.cumsum(alone) - 1, (users * 7 + items * 3) % 40)
    actions = pl.DataFrame({"user_id": users, "item_id": taken})
    ids = [*range(40), *range(100, 100 + single), *range(500, 500 + unused)]
    catalogue = pl.DataFrame({"item_id": ids, "category": [f"c{i % 4}" for i in ids]})
    if has_text:
        catalogue = catalogue.with_columns(about=pl.Series([f"story of {i} and {i % 7}" for i in ids]))
    found = of((None, catalogue, actions))
    assert (found.recipe, found.shape.by_time) == (recipe, False)
    pairs = found.config.model.pairs
    if recipe == "collaborative":
        assert (pairs[-1].item.fields, pairs[-1].item.width) == (("category",), 5), "its four values, and one more"


def test_users_without_a_history_are_ranked_by_their_columns() -> None:
    actions, users = with_columns(1.0, each=1)
    found = suggest(actions, users, overrides=["train.seed=1", "evaluation.k=[10,20]"])
    assert {f.name for f in found.schema.side("user")} == {"history", "__ials", "city"}
    assert found.config.model.pairs[0].user.fields == ("history", "city")
    assert (found.config.model.bias, found.config.model.cold_item_bias) == (True, False)
    metrics = twotower.fit(check(users, None, actions, found.schema), found.schema, found.config).metrics
    assert metrics["test.recall@10"] > 0.9  # ten of forty items are of a city
    assert metrics["baseline.popularity.recall@10"] < 0.5


def test_the_text_that_shares_words_is_the_query() -> None:
    users, items, actions = queries()
    users = users.select("query_id", pl.format("Jane Brown {}", "query_id").alias("person"), "query")
    items = items.select("item_id", pl.format("paper book {}", "item_id").alias("kind_of"), "title")
    found = of((users, items, actions))
    assert (found.recipe, found.shape.query, found.shape.words) == ("words", "query", "title")


def test_two_accounts_that_repeat_one_item_make_no_log_of_repeats() -> None:
    rows = [(user, (user * 7 + 3 * n) % 50) for user in range(200) for n in range(6)]
    rows += [(7, 1)] * 300 + [(8, 1)] * 400
    actions = pl.DataFrame(rows, schema=["user_id", "item_id"], orient="row")
    assert repeated_share(actions, "user_id", "item_id") < 0.1 < 700 / len(rows)
    assert repeated_share(actions.clear(), "user_id", "item_id") == 0
    every = actions.head(1200)
    again = pl.concat([every, every.head(400)])
    assert repeated_share(again, "user_id", "item_id") == pytest.approx(400 / 1600)
    guests = pl.DataFrame({"user_id": range(1000, 4000), "item_id": [n % 50 for n in range(3000)]})
    share = repeated_share(pl.concat([again, guests]), "user_id", "item_id")
    assert share == pytest.approx(400 / 4600), "users of one row count by themselves, and make none typical"


@pytest.mark.parametrize(("repeats", "ranked"), [(0, False), (9, False), (10, True), (50, True)])
def test_repeats_are_ranked_from_a_tenth_on_and_kept_where_rows_have_times(repeats: int, ranked: bool) -> None:
    actions = log(n_users=10, length=10, n_items=70, strength=1.0).unique(["user_id", "item_id"], maintain_order=True)[
        : 100 - repeats
    ]
    rows = pl.concat([actions, actions[:repeats].with_columns(timestamp=pl.col("timestamp") + 10**6)])
    found = suggest(rows)
    assert found.schema.duplicates == ("keep" if repeats else "last")
    assert (found.config.evaluation.repeats == "allow") == ranked == adds(found, "repeats")
    assert found.config.split.follows_time
    assert suggest(rows.drop("timestamp")).schema.duplicates == ("keep" if ranked else "last")
    drawn = suggest(rows, overrides=["split.kind=random"])
    assert drawn.schema.duplicates == ("keep" if ranked else "last"), "of rows in no order the last stays"
    for given in ("last", "keep"):
        asked = suggest(rows, overrides=[f"schema.duplicates={given}", "split.kind=random"])
        assert asked.schema.duplicates == given


@pytest.mark.parametrize("share", [0.0, 0.05, 0.08, 0.1, 0.2, 0.9])
def test_what_is_popular_now_is_read_where_it_changes(share: float) -> None:
    found = of((None, None, waves(share, n_users=480)))
    drift = found.shape.drift
    assert drift is not None
    assert (drift.lift >= 1.2) == (share >= 0.1), "the sweep has both sides of the threshold"
    assert adds(found, "trending") == (share >= 0.1)
    assert f"one item {drift.lift:.2f} times as often as any two" in " ".join(found.reasons)
    assert ("# What is popular changes:" in found.text) == (share >= 0.1)


@pytest.mark.parametrize(
    ("returning", "length", "kind"),
    [(0, 6, "last"), (14, 6, "last"), (16, 6, "time"), (0, 3, "last"), (0, 2, "random")],
)
def test_users_who_do_not_come_again_are_tested_by_their_last_rows(returning: int, length: int, kind: str) -> None:
    actions = sessions(300, length, returning)
    found = of((None, None, actions))
    assert (found.recipe, found.schema.duplicates, found.config.split.kind) == ("collaborative", "keep", kind)
    assert found.shape.new_users == pytest.approx(1 - returning / 30, abs=0.04)
    assert ("of users without an earlier row" in found.text.replace("\n# ", " ")) == (kind == "last")


def test_a_last_row_of_equal_times_is_none() -> None:
    baskets = sessions().with_columns(pl.col("timestamp").min().over("user_id")).sort("user_id", "item_id")
    found = of((None, None, baskets))
    assert (found.recipe, found.schema.duplicates, found.config.split.kind) == ("collaborative", "keep", "user_random")


def test_new_words_are_tested_by_time() -> None:
    users, items, actions = queries(clicks=2, n=300)
    again = (
        pl.concat([actions, actions]).sort("query_id").with_columns(timestamp=1_600_000_000 + pl.int_range(pl.len()))
    )
    found = of((users, items, again))
    assert (found.recipe, found.config.split.kind) == ("words", "time")
    assert found.shape.new_users > 0.5


def test_shares_of_the_recipes_split_are_left_out_of_a_rule_that_reads_none() -> None:
    default = SplitConfig()
    for kind, validation in (("last", None), ("last", 0), ("random", None)):
        given = [] if validation is None else [f"split.validation={validation}"]
        found = suggest(log(), recipe="collaborative", overrides=[f"split.kind={kind}", *given]).config.split
        assert (found.test, found.validation) == (default.test, default.validation if validation is None else 0)
        assert not found.without_effect


@pytest.mark.parametrize(("users", "share"), [(39_999, None), (40_000, 0.5)])
def test_of_many_users_some_are_measured(users: int, share: float | None) -> None:
    actions = log(n_users=users, length=3, strength=1.0, n_items=60)
    actions = pl.concat([actions, actions[:100].with_columns(pl.col("user_id") + users)])  # of one row
    found = of((None, None, actions))
    assert found.shape.measurable == users
    assert (found.config.split.kind, found.config.split.users) == ("last", share or 1.0)
    assert ("users are enough to test" in found.text.replace("\n# ", " ")) == (share is not None)
    if share:
        assert suggest(actions, overrides=["split.kind=time"]).config.split.users == 1.0
        assert suggest(actions, overrides=["split.users=0.7"]).config.split.users == 0.7


@pytest.mark.parametrize(("length", "kind"), [(4, "random"), (5, "random"), (6, "user_random")])
def test_a_tenth_of_few_rows_is_drawn_from_all_users_together(length: int, kind: str) -> None:
    actions = log(n_users=50, length=length, strength=1.0, n_items=60).drop("timestamp")
    found = of((None, None, actions))
    assert (found.recipe, found.config.split.kind) == ("collaborative", kind)
    assert ("a tenth rounds to none" in found.text.replace("\n#", "")) == (kind == "random")
    data = build_dataset(check(None, None, actions, found.schema), found.schema, found.config.split)
    assert min(len(data.validation), len(data.test)) >= 20


@pytest.mark.parametrize(("items", "kind"), [(1024, "full"), (1025, "uniform")])
def test_a_catalogue_that_is_drawn_whole_is_taken_whole(items: int, kind: str) -> None:
    catalogue = pl.DataFrame({"item_id": range(items), "category": [f"c{i % 4}" for i in range(items)]})
    found = suggest(log(length=8), items=catalogue, recipe="sequence-short")
    assert [source.kind for source in found.config.negatives.sources] == ["in_batch", kind]


def test_a_recipe_without_its_column_says_what_it_needs() -> None:
    actions = log().drop("timestamp")
    with pytest.raises(ConfigError, match=r"'sequence-long' needs a time: set schema\.time"):
        of((None, None, actions), recipe="sequence-long")
    with pytest.raises(ConfigError, match=r"'ranking' needs negatives: set schema\.label"):
        of((None, None, actions), recipe="ranking")
    with pytest.raises(ConfigError, match="'words' needs a text column"):
        of((None, None, actions), recipe="words")
    with pytest.raises(ConfigError, match="did you mean 'sequence-long'.*allowed: words"):
        of((None, None, actions), recipe="sequence-lang")


def test_overrides_replace_guesses_and_settings() -> None:
    actions = log(length=8).rename({"timestamp": "zeit"}).with_columns(timestamp=pl.lit(0))
    found = suggest(
        actions, overrides=["schema.time=zeit", "train.epochs=3", "evaluation.k=[5]", "train.monitor=validation.ndcg@5"]
    )
    assert (found.schema.time, found.config.train.epochs, found.config.evaluation.k) == ("zeit", 3, (5,))
    for spelled in ("schema.time=", " schema.time=", '"schema".time=', 'schema={time=""}'):
        assert suggest(log(length=8), overrides=[spelled]).recipe == "collaborative"
    second = suggest(log(length=8), overrides=["model.pairs.1.user.dropout=0.25"])  # of a list that the recipe gives
    assert [pair.user.dropout == 0.25 for pair in second.config.model.pairs][:2] == [False, True]
    with pytest.raises(ConfigError, match="unknown key 'train.epoch'"):
        suggest(log(length=8), overrides=["train.epoch=3"])
    with pytest.raises(DataError, match="no column 'zeit'"):
        suggest(log(length=8), overrides=["schema.time=zeit"])


def test_times_in_a_file_are_read_as_a_training_reads_them(tmp_path: Path) -> None:
    times = pl.from_epoch("timestamp").dt.strftime("%Y-%m-%d %H:%M:%S UTC")
    log(length=8).with_columns(times).write_csv(tmp_path / "clicks.csv")
    ids = range(40)
    born = [f"2020-01-{1 + i % 28:02d}" for i in ids]
    pl.DataFrame({"item_id": ids, "born": born}).write_csv(tmp_path / "items.csv")
    for overrides in ([], ["schema.time=timestamp"], ["schema.time_format=%Y-%m-%d %H:%M:%S UTC"]):
        found = suggest(tmp_path / "clicks.csv", items=tmp_path / "items.csv", folder=tmp_path, overrides=overrides)
        assert (found.recipe, found.schema.time_format) == ("sequence-short", "%Y-%m-%d %H:%M:%S UTC")
        assert any((f.kind, f.name) == ("date", "born") for f in found.schema.side("item"))


def test_paths_are_relative_to_the_folder_of_the_config(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "configs").mkdir()
    log(length=8).write_csv(tmp_path / "data" / "clicks.csv")
    found = suggest(tmp_path / "data" / "clicks.csv", folder=tmp_path / "configs")
    assert tomllib.loads(found.text)["data"]["interactions"] == "../data/clicks.csv"
    (tmp_path / "configs" / "mine.toml").write_text(found.text, encoding="utf-8")
    schema, config = load_config(tmp_path / "configs" / "mine.toml")
    assert (schema, config) == (found.schema, found.config)


def test_batches_epochs_and_windows_follow_the_rows() -> None:
    small, large = (of((None, None, log(n_users=n, length=30)), recipe="sequence-long") for n in (60, 600))
    assert (small.config.train.batch_size, large.config.train.batch_size) == (64, 512)
    windows = [
        f["pooling"]["window"]
        for f in tomllib.loads(large.text)["schema"]["features"]
        if "window" in f.get("pooling", {})
    ]
    assert windows == [32]


def shaped(
    name: str, columns: tuple[SideFeature, ...] = (), length: int = 8, **shape: Any
) -> tuple[Settings, FittedRecipe]:
    """Return what a recipe becomes for a log of another shape, and the fitted recipe with its comments."""
    rule = next(rule for rule in RULES if rule.recipe == name)
    fitted = FittedRecipe(read_recipe(name), {"user": "user_id", "item": "item_id"}, columns, False)
    return fitted.shaped(replace(of((None, None, log(length=length))).shape, **shape), rule), fitted


def parsed(found: Settings, fitted: FittedRecipe, **schema: str) -> tuple[Schema, Config]:
    """Return the schema and the config of a recipe that was fitted."""
    evaluation = read_recipe("collaborative")["evaluation"]
    made, config = parse_config({**found, "evaluation": evaluation, "schema": {"features": fitted.features, **schema}})
    assert made is not None
    return made, config


BRAND = SideFeature("brand", {"kind": "categorical", "side": "item", "name": "brand"}, "")


@pytest.mark.parametrize(
    ("recipe", "rows", "epochs", "batch"),
    [
        # A small log has a tenth of the steps of the recipe, which are 12 epochs of 245; 8 epochs of 1,024 rows.
        ("sequence-long", 100, 100, 64), ("sequence-long", 1_280, 15, 64), ("sequence-long", 100_000, 12, 4096),
        # The steps of short histories are a thousand.
        ("sequence-short", 420, 100, 64), ("sequence-short", 20_000, 25, 512), ("sequence-short", 124_000, 9, 1024),
        ("sequence-short", 127_999, 8, 1024),
    ],
)  # fmt: skip
def test_epochs_and_batches_follow_the_rows(recipe: str, rows: int, epochs: int, batch: int) -> None:
    found: Any
    found, fitted = shaped(recipe, length=30 if recipe == "sequence-long" else 8, taken=rows)
    assert (found["train"]["epochs"], found["train"]["batch_size"]) == (epochs, batch)
    assert ("train.epochs" in fitted.comments) == (epochs > (12 if recipe == "sequence-long" else 8))


@pytest.mark.parametrize(
    ("rows", "users", "items", "width"),
    [
        (575_281, 6038, 3533, 128), (211_073, 6038, 3533, 128), (211_072, 6038, 3533, 256), (1000, 6038, 3533, 512),
        (1000, 6038, 255, 128), (1000, 300, 9000, 256), (1000, 60, 9000, 60),
    ],
)  # fmt: skip
def test_a_model_that_is_its_start_is_wider_on_a_small_log(rows: int, users: int, items: int, width: int) -> None:
    found: Any
    found, fitted = shaped("collaborative", taken=rows, users=users, items=items)
    assert found["scorers"][0].get("width", 128) == width
    assert ("scorers.0" in fitted.comments) == (width != 128)


@pytest.mark.parametrize(
    ("items", "common", "is_left"), [(10_000, 9_990, False), (10_001, 10_001, True), (30_000, 10_000, False)]
)
@pytest.mark.parametrize("columns", [(), (BRAND,)], ids=["no columns", "brand"])
def test_a_closed_form_beside_another_is_left_out_where_it_does_not_fit(
    items: int, common: int, is_left: bool, columns: tuple[SideFeature, ...]
) -> None:
    found, fitted = shaped("collaborative", columns, users=50_000, items=items, common=common)
    schema, left = parsed(found, fitted)
    kinds, names = [form.kind for form in left.train.solved], {f.name for f in schema.features}
    assert kinds == ["ials"] + ["ease"] * (not is_left) + ["columns"] * len(columns)
    assert len(left.model.pairs) == len(kinds)
    assert {"__ease", "__columns"} & names == {name for name in ("__ease", "__columns") if name[2:] in kinds}
    assert ("scorers" in fitted.comments) == (is_left or not columns)


@pytest.mark.parametrize(("values", "room"), [(3, 4), (100, 110), (232, 256), (4000, 4400)])
def test_a_pair_of_columns_is_a_tenth_wider_than_they_have_values(values: int, room: int) -> None:
    found, fitted = shaped("collaborative", (BRAND,), users=5000, items=5000, values={"brand": values})
    _, fits = parsed(found, fitted, time="timestamp")
    width = min(room, 256)
    assert [pair.user.width for pair in fits.model.pairs][1:] == [256, width]
    assert [pair.item.width for pair in fits.model.pairs][1:] == [256, 2 * width], "a piece for each rate of the order"
    assert ("scorers.2" in fitted.comments) == (room < 256)


@pytest.mark.parametrize("rates", [[0.0, 1.0], []])
def test_new_items_are_ranked_by_what_their_columns_follow_in_the_order_that_there_is(rates: list[float]) -> None:
    actions, items = with_new_items(log(length=8), 0.5)
    actions = actions if rates else actions.drop("timestamp")
    items = items.with_columns(about=pl.Series([f"film{i} of thing{7 * i} and other{3 * i}" for i in items["item_id"]]))
    found = suggest(actions, None, items, recipe="cold-start")
    pooling = next(f.pools for f in found.schema.features if f.name == "__columns")
    assert pooling == (PoolingSpec(kind="decay", rates=rates) if rates else MEAN)
    pair = found.config.model.pairs[-1]
    assert pair.item.fields == ("category", "price"), "no closed form reads text"
    assert (pair.user.width or 0) * max(1, len(rates)) == pair.item.width
    data = build_dataset(check(None, items, actions, found.schema), found.schema, found.config.split)
    Trainer(data, found.config)


def test_values_of_columns_are_counted_in_lists_too_and_numbers_by_buckets() -> None:
    items = pl.DataFrame({"item_id": range(200), "brand": [f"b{i % 7}" for i in range(200)]}).with_columns(
        tags=pl.Series([f"t{i % 5}|t{5 + i % 3}" for i in range(200)]), price=pl.int_range(200) * 0.37
    )
    shape = of((None, items, log(n_items=200))).shape
    assert (shape.contents, shape.texts) == (3, 0)
    assert shape.values == {"brand": 7, "tags": 8, "price": 16}


def test_a_large_catalogue_is_sampled() -> None:
    actions = log(n_users=60, length=30)
    many = pl.DataFrame({"item_id": range(50_001), "category": [f"c{i % 4}" for i in range(50_001)]})
    found = suggest(actions, items=many, recipe="sequence-long")
    assert {source.kind for source in found.config.negatives.sources} >= {"uniform"}
    assert "negatives" in of((None, None, actions), recipe="sequence-long").text
    assert "uniform" not in of((None, None, actions), recipe="sequence-long").text


@pytest.mark.parametrize(("later", "ordered"), [(True, True), (False, False)])
def test_files_of_parts_are_the_split(tmp_path: Path, later: bool, ordered: bool) -> None:
    actions = log(length=8)
    cut = [actions[:360], actions[360:420], actions[420:]]
    for name, frame in zip(("train", "valid", "test") if later else ("test", "valid", "train"), cut, strict=True):
        frame.write_csv(tmp_path / f"{name}.csv")
    found = suggest(tmp_path, folder=tmp_path)
    assert (found.config.split.kind, found.config.split.ordered) == ("files", ordered)
    (tmp_path / "mine.toml").write_text(found.text, encoding="utf-8")
    schema, config = load_config(tmp_path / "mine.toml")
    assert (schema, config) == (found.schema, found.config)
    tables, schema = read(config, schema)
    assert isinstance(tables, Tables)
    dataset = build_dataset(tables, schema, config.split)
    assert {*np.unique(dataset.parts)} == {0, 1, 2}


def test_ids_of_another_name_in_a_table_are_found_and_written(tmp_path: Path) -> None:
    actions = log(length=8).rename({"user_id": "user", "item_id": "product"})
    users = pl.DataFrame({"age": [i % 9 for i in range(60)], "user_id": range(60)})
    items = pl.DataFrame({"asin": sorted(actions["product"].unique())}).with_columns(
        title=pl.format("the item {}", "asin")
    )
    (tmp_path / "shop").mkdir()
    for name, table in {"clicks": actions, "users": users, "items": items}.items():
        table.write_csv(tmp_path / "shop" / f"{name}.csv")
    for found in (suggest(actions, users, items), suggest(tmp_path / "shop", folder=tmp_path)):
        assert (found.schema.user_id, found.schema.users_id) == ("user", "user_id")
        assert (found.schema.item_id, found.schema.items_id, found.schema.title) == ("product", "asin", "title")
        assert 'users_id = "user_id"  # the table of users holds the same ids in it' in found.text
    tables, _ = read(found.config, found.schema)
    assert isinstance(tables, Tables)
    assert tables.users.columns == ["age", "user"]
    assert tables.items["product"].to_list() == items["asin"].to_list()
    assert suggest(actions, users, overrides=["schema.users_id=user_id"]).schema.users_id == "user_id"
    with pytest.raises(DataError, match="no column 'user'.*or the id column of this table in schema.users_id"):
        suggest(actions, users.with_columns(user_id=pl.col("user_id") + 100))  # no column holds them


@pytest.mark.parametrize(
    ("users", "told"),
    [
        (pl.DataFrame({"user_id": pl.Series([], dtype=pl.Int64)}), "the table has no rows"),
        (pl.DataFrame({"user_id": pl.Series([None] * 5, dtype=pl.Int64)}), "5 missing ids"),
        (pl.DataFrame({"user_id": [[1], [2]]}), "expected one id a row"),
        (pl.DataFrame({"user_id": [b"1", b"\xff"]}), "found Binary"),
    ],
)
def test_a_table_whose_ids_are_none_is_told_so(users: pl.DataFrame, told: str) -> None:
    with pytest.raises(DataError, match=told):
        suggest(log(), users.with_columns(city=pl.lit("a")))


@pytest.mark.parametrize("others", [[str(u) for u in range(100, 103)], ["010"], [" 11"]])
def test_a_table_that_may_be_of_others_or_spelled_otherwise_is_refused_with_the_way_out(others: list[str]) -> None:
    ids = [*map(str, range(10)), *others]
    users = pl.DataFrame({"user_id": ids, "city": [f"c{i % 2}" for i in range(len(ids))]})
    actions = log().with_columns(pl.col("user_id").cast(pl.String))
    with pytest.raises(DataError, match=r"schema.unknown_users = 'add'"):
        suggest(actions, users)
    assert suggest(actions, users, overrides=["schema.unknown_users=add"]).schema.unknown_users == "add"


IDS = {"user_id": [i % 40 for i in range(400)], "item_id": [i * 7 % 23 for i in range(400)]}
TIMES = [1_600_000_000 + 100 * i for i in range(400)]


@pytest.mark.parametrize(
    "values",
    [TIMES, [f"a text {i}" for i in range(400)], [f"2023-01-{1 + i % 28:02d}" for i in range(400)]],
    ids=["times", "texts", "dates"],
)
@pytest.mark.parametrize("name", ["*", "^a$", "__time"])
def test_a_column_of_a_name_that_no_schema_has_is_left_out(name: str, values: list[object], tmp_path: Path) -> None:
    rows = pl.DataFrame({**IDS, name: values})
    items = rows.unique("item_id", maintain_order=True).drop("user_id")
    rows.write_csv(tmp_path / "clicks.csv")
    for found in (
        suggest(rows),
        suggest(pl.DataFrame(IDS), None, items),
        suggest(tmp_path / "clicks.csv", folder=tmp_path),
    ):
        assert f"'{name}'" in "".join(found.reasons)
        assert (found.schema.user_id, found.schema.item_id, found.schema.time) == ("user_id", "item_id", "")
        assert name not in [f.source for f in found.schema.features]
    with pytest.raises((DataError, ConfigError), match=r"rename|no column"):
        suggest(rows, overrides=[f"schema.user_id={name}"])


def test_a_table_without_a_value_is_refused() -> None:
    nothing = pl.DataFrame({"user_id": [None] * 50, "item_id": [None] * 50, "time": [None] * 50})
    with pytest.raises(DataError, match="'user_id' has 50 missing ids in 50 rows; fill them, or set schema.missing"):
        suggest(nothing)
    with pytest.raises(DataError, match="50 of 50 rows have no id .* and no other row is left"):
        suggest(nothing, overrides=["schema.missing=drop"])
    with pytest.raises(DataError, match="user: no usual name\n  item: no usual name"):
        suggest(nothing.rename({"user_id": "a", "item_id": "b", "time": "c"}))


def test_rows_without_an_id_are_one_refusal_that_names_the_setting(tmp_path: Path) -> None:
    rows = log(length=8).with_columns(session=pl.col("user_id") * 2)
    rows = rows.with_columns(user_id=pl.when(pl.int_range(pl.len()) % 4 > 0).then("user_id"))
    rows.write_parquet(tmp_path / "clicks.parquet")
    missing = rows["user_id"].null_count()
    refusal = f"'user_id' has {missing} missing ids .* schema.missing = 'drop' .* schema.user_id = 'session'"
    with pytest.raises(DataError, match=refusal):
        suggest(tmp_path / "clicks.parquet", folder=tmp_path)
    found = suggest(tmp_path / "clicks.parquet", folder=tmp_path, overrides=["schema.missing=drop"])
    assert (found.schema.missing, found.shape.users) == ("drop", rows["user_id"].drop_nulls().n_unique())
    tables, _ = read(found.config, found.schema)
    assert isinstance(tables, Tables)
    assert tables.interactions.height == rows.height - missing
    views = rows.with_columns(event=pl.when(pl.col("user_id").is_null()).then(pl.lit("view")).otherwise(pl.lit("buy")))
    rules = ["schema.event=event", "schema.events.view=ignored", "schema.events.buy=1"]
    assert suggest(views, overrides=rules).schema.missing == "error"  # ignored rows need no user


def test_fault_G11_bad_times_are_one_refusal_that_names_the_setting(tmp_path: Path) -> None:
    rows = log(length=8)
    bad = rows.with_columns(timestamp=pl.when(pl.int_range(pl.len()) % 100 == 7).then(0).otherwise("timestamp"))
    bad.write_csv(tmp_path / "clicks.csv")
    refusal = "times are not between 1990 and tomorrow in unit 's' .*: correct them, or set schema.bad_times = 'drop'"
    with pytest.raises(DataError, match=refusal):
        suggest(tmp_path / "clicks.csv", folder=tmp_path)
    found = suggest(tmp_path / "clicks.csv", folder=tmp_path, overrides=["schema.bad_times=drop"])
    good = suggest(bad.filter(pl.col("timestamp") > 0))
    assert (found.schema.time, found.schema.time_unit, found.schema.bad_times) == ("timestamp", "s", "drop")
    assert (found.recipe, found.shape.interactions) == (good.recipe, good.shape.interactions)
