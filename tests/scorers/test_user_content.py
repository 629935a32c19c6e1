"""Start `user_content` in a log whose users take what others of their town and age take: new users too, and what is
refused."""

from __future__ import annotations

import datetime
import logging
import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from worlds import settings

from twotower.config.experiment import Config
from twotower.data.dataset import Dataset, build_dataset
from twotower.data.split import SplitConfig
from twotower.data.splits import TEST, TRAIN, VALIDATION
from twotower.data.tables import check
from twotower.errors import ConfigError, TrainingError
from twotower.evaluation.config import EvaluationConfig
from twotower.evaluation.part_evaluation import evaluate_part
from twotower.features.categorical import Categorical
from twotower.features.feature import Feature
from twotower.features.multi_hot import MultiHot
from twotower.features.numeric import Numeric
from twotower.features.schema import Schema
from twotower.features.sequence import Sequence
from twotower.features.text import Text
from twotower.onnx.export import export_tower
from twotower.onnx.tower import OnnxTower
from twotower.scorers.user_content import fewer_columns, leading
from twotower.train.factors import factors_before
from twotower.train.trainer import Trainer

USERS, ITEMS, TOWNS = 600, 60, 6
FEATURES: tuple[Feature, ...] = (
    Sequence(name="h", side="user", share_embedding=False, pooling={"kind": "sum"}),
    Categorical(name="town", side="user"),
    Categorical(name="size", side="user"),
    Categorical(name="item_id", side="item"),
    Categorical(name="place", side="item"),
    Categorical(name="colour", side="item"),
)


def users() -> pl.DataFrame:
    """A town of each user, and a shoe size that tells nothing."""
    rng = np.random.default_rng(4)
    return pl.DataFrame(
        {"user_id": range(USERS), "town": [f"t{u % TOWNS}" for u in range(USERS)], "size": rng.integers(38, 42, USERS)}
    )


def items() -> pl.DataFrame:
    """A place of each item, and a colour that tells nothing."""
    rng = np.random.default_rng(5)
    colours = [f"c{c}" for c in rng.integers(0, 3, ITEMS)]
    return pl.DataFrame({"item_id": range(ITEMS), "place": [f"p{i % TOWNS}" for i in range(ITEMS)], "colour": colours})


def log() -> pl.DataFrame:
    """Two thirds of what a user takes is of the place that belongs to the town; every fifth user is in the test part
    alone, and item 7 too."""
    rng, rows = np.random.default_rng(6), list[tuple[int, int, str]]()
    for user in range(USERS):
        near = rng.permutation(np.arange(user % TOWNS, ITEMS, TOWNS))[:4]
        taken = np.unique([*near, *rng.integers(0, ITEMS, 2)])
        for item in rng.permutation(taken):
            part = "test" if user % 5 == 0 or item == 7 else str(rng.choice(["train", "train", "train", "validation"]))
            rows.append((user, int(item), part))
    return pl.DataFrame(rows, schema=["user_id", "item_id", "part"], orient="row")


def world(features: tuple[Feature, ...] = FEATURES, people: pl.DataFrame | None = None, **options: Any) -> Dataset:
    schema = Schema(features=features, **options)
    tables = check(users() if people is None else people, items(), log(), schema)
    return build_dataset(tables, schema, SplitConfig(kind="column", column="part"))


def of(
    user: list[str], item: list[str], width: int = 32, beside: bool = False, tower: dict[str, Any] | None = None
) -> Config:
    """`user_content` of these columns, alone, or weighted after `ease`."""
    plain: dict[str, Any] = {"layers": [], "width": width, "join": "sum", "activation": "Identity"}
    pairs = [{"user": {"fields": user, **plain, **(tower or {})}, "item": {"fields": item, **plain}}]
    starts: list[dict[str, Any]] = [{"kind": "user_content"}]
    if beside:
        one: dict[str, Any] = {"layers": [], "width": width}
        pairs = [{"user": {"fields": ["h"], **one}, "item": {"fields": ["item_id"], **one}}, *pairs]
        starts = [{"kind": "ease"}, {"kind": "user_content", "pair": 1}]
    return settings(
        model={"width": width, "similarity": "dot", "bias": False, "temperature": 1.0, "pairs": pairs},
        loss={"kind": "softmax"},
        negatives={"full": True},
        train={"epochs": 0, "start": starts, "monitor": "validation.ndcg@5", "device": "cpu"},
    )


def ndcg(data: Dataset, chosen: Config) -> float:
    model = Trainer(data, chosen).run().model
    return evaluate_part(factors_before(model, data, TEST), data, TEST, EvaluationConfig(k=[5]))["ndcg@5"]


def test_users_without_a_history_are_ranked_for_by_their_columns() -> None:
    data = world()
    by_columns, by_id = (ndcg(data, of(["town", "size"], fields)) for fields in (["place", "colour"], ["item_id"]))
    noise = ndcg(data, of(["size"], ["place", "colour"]))
    assert min(by_columns, by_id) > 1.5 * noise
    model = Trainer(data, of(["town"], ["place", "item_id"])).run().model
    found = factors_before(model, data, TEST)
    new = data.users.ids.cast(pl.Int64).to_numpy() % 5 == 0
    best = (found.users[new] @ found.items.T).argmax(1).numpy()
    at_home = (
        data.items.ids.cast(pl.Int64).to_numpy()[best] % TOWNS == data.users.ids.cast(pl.Int64).to_numpy()[new] % TOWNS
    )
    assert at_home.all()


def test_an_item_that_training_lacks_is_ranked_by_its_columns_and_not_by_its_id() -> None:
    data = world()
    lacking = int(np.flatnonzero(data.items.ids.cast(pl.Int64).to_numpy() == 7)[0])
    by_place, by_id = (
        factors_before(Trainer(data, of(["town"], fields)).run().model, data, TEST).items[lacking]
        for fields in (["place"], ["item_id"])
    )
    assert by_place.abs().max() > 0.1
    assert not by_id.any()


@pytest.mark.parametrize("width", [2, 4, 6])
def test_of_more_values_than_dimensions_the_leading_directions_are_kept(width: int) -> None:
    data = world()
    model = Trainer(data, of(["town"], ["place"], width=width)).run().model
    found = factors_before(model, data, TEST)
    pairs = data.pairs.take(data.parts == TRAIN)
    towns, places = (data.side(side).ids.cast(pl.Int64).to_numpy() % TOWNS for side in ("user", "item"))
    counts = np.zeros((TOWNS, TOWNS))
    np.add.at(counts, (towns[pairs.user], places[pairs.item]), 1)
    rows, columns = (counts.sum(axis) / counts.sum() for axis in (1, 0))
    logs = np.log((counts + 5) / (counts.sum() * np.outer(rows, columns) + 5))
    u, s, vt = np.linalg.svd(np.sqrt(rows)[:, None] * logs * np.sqrt(columns))
    nearest = (u[:, :width] * s[:width] @ vt[:width]) / np.sqrt(rows)[:, None] / np.sqrt(columns)
    np.testing.assert_allclose((found.users @ found.items.T).numpy(), nearest[towns][:, places], rtol=1e-3, atol=1e-4)


def test_pairs_of_columns_that_tell_weigh_most_beside_other_pairs(caplog: pytest.LogCaptureFixture) -> None:
    data = world()
    with caplog.at_level(logging.INFO, "twotower"):
        beside = ndcg(data, of(["town", "size"], ["place", "colour"], beside=True))
    (mixed,) = (line for line in caplog.messages if line.startswith("mix, in standard deviations"))
    spreads = {name: float(value) for name, value in re.findall(r"(\w+ \(\w+\)) (-?\d+\.\d\d)", mixed)}
    assert {*spreads} == {f"{item} ({user})" for item in ("place", "colour") for user in ("town", "size")}
    assert spreads.pop("place (town)") > 4 * max(map(abs, spreads.values()))
    assert beside > 1.3 * ndcg(data, of(["size"], ["place"], beside=True))


def test_the_exported_tower_has_the_vectors_of_users_by_their_columns() -> None:
    data = world()
    model = Trainer(data, of(["town", "size"], ["place"])).run().model.eval()
    fields = data.encoders.fields("user")
    with tempfile.TemporaryDirectory() as folder:
        export_tower(model, "user", fields, Path(folder, "user"))
        codes = np.stack([np.asarray(data.users.columns[f.name]) for f in fields if f.kind == "lookup"], 1)
        given = {"lookup": codes.astype(np.int64), "bag0": np.full((len(codes), 1), -1)}
        tower = OnnxTower(Path(folder, "user"))
        found = tower({name: rows for name, rows in given.items() if name in tower.inputs})
    np.testing.assert_allclose(found, factors_before(model, data, TEST).users.numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "tower", "message"),
    [
        (["user_id"], {}, "feature 'user_id' is the id of the users; leave it out of model.pairs.0.user.fields"),
        (["town", "h"], {}, "feature 'h' is a history; leave it out of model.pairs.0.user.fields"),
        (["about"], {}, "feature 'about' pools by 'ridge', by which its vector is no weighted sum of its values; leave "
            "it out"),
        (["height"], {}, "feature 'height' has no embedding of each value"),
        (["town", "size"], {"join": "concat", "width": 16}, "needs a user tower that is the sum of its fields; set "
            "model.pairs.0.user = {"),
        (["town"], {"layers": [32]}, "needs a user tower that is the sum of its fields"),
    ],
)  # fmt: skip
def test_users_are_columns_of_values_that_are_added_up(fields: list[str], tower: dict[str, Any], message: str) -> None:
    features = (
        *FEATURES,
        Categorical(name="user_id", side="user"),
        Text(name="about", side="user", pooling={"kind": "ridge"}),
    )
    features += (Numeric(name="height", side="user"),)
    people = users().with_columns(about=pl.lit("a b"), height=pl.int_range(USERS))
    with pytest.raises(ConfigError, match=re.escape(message)):
        Trainer(world(features, people), of(fields, ["place"], tower=tower))


def test_users_who_change_their_values_are_refused() -> None:
    people = users().with_columns(since=pl.lit(datetime.datetime(2020, 1, 1)))
    schema = Schema(features=FEATURES, time="t", valid_from="since")
    rows = log().with_columns(t=pl.lit(datetime.datetime(2021, 1, 1)))
    data = build_dataset(check(people, items(), rows, schema), schema, SplitConfig(kind="column", column="part"))
    with pytest.raises(ConfigError, match="leave out the start and its pair, or schema.valid_from"):
        Trainer(data, of(["town"], ["place"]))


def test_columns_that_no_user_has_tell_nothing() -> None:
    people = users().with_columns(town=pl.lit(None, pl.String))
    with pytest.raises(
        TrainingError, match="finds no column of the users that the positives tell apart; leave the start"
    ):
        Trainer(world(people=people), of(["town"], ["place"])).run()


@pytest.mark.parametrize(
    ("users", "items", "left"),
    [
        ({"friends": 5000, "town": 9}, {"id": 9000}, (["town"], ["id"])),
        ({"friends": 4096, "town": 9}, {"id": 9000}, (["town", "friends"], ["id"])),
        ({"friends": 5000, "town": 9}, {"id": 4000}, (["town", "friends"], ["id"])),
        ({"friends": 5000}, {"id": 9000, "brand": 40}, (["friends"], ["brand"])),
        ({"friends": 5000}, {"id": 9000}, ([], [])),
        ({"town": 60, "age": 20}, {"id": 2**20}, (["age"], ["id"])),
        ({}, {"id": 9}, ([], [])),
    ],
)
def test_columns_of_too_many_values_to_be_counted_are_told(
    users: dict[str, int], items: dict[str, int], left: tuple[list[str], list[str]]
) -> None:
    assert fewer_columns(users, items) == left


def test_more_pairs_of_values_than_are_counted_are_refused() -> None:
    n = 12_000
    people = pl.DataFrame({"user_id": range(n), "town": [f"t{u}" for u in range(n)]})
    goods = pl.DataFrame({"item_id": range(n), "place": [f"p{i}" for i in range(n)]})
    parts = pl.Series(["train"] * (n - 2) + ["validation", "test"])
    rows = pl.DataFrame({"user_id": range(n), "item_id": range(n), "part": parts})
    features = tuple(f for f in FEATURES if f.name not in ("size", "colour"))
    schema = Schema(features=features)
    data = build_dataset(check(people, goods, rows, schema), schema, SplitConfig(kind="column", column="part"))
    with pytest.raises(
        TrainingError,
        match=r"counts at most 67,108,864 pairs of values, and 4,096 values of one column; the columns have 11,99\d of",
    ):
        Trainer(data, of(["town"], ["place"])).run()


def test_weights_of_rows_count() -> None:
    """Rows of the weight 0.001 say nothing of a town."""
    rows = log().with_columns(
        w=pl.when(pl.col("item_id") % TOWNS == pl.col("user_id") % TOWNS).then(0.001).otherwise(1.0)
    )
    schema = Schema(features=FEATURES, weight="w")
    data = build_dataset(check(users(), items(), rows, schema), schema, SplitConfig(kind="column", column="part"))
    found = factors_before(Trainer(data, of(["town"], ["place"])).run().model, data, VALIDATION)
    towns, places = (data.side(side).ids.cast(pl.Int64).to_numpy() % TOWNS for side in ("user", "item"))
    at_home = towns[:, None] == places
    scores = (found.users @ found.items.T).numpy()
    assert scores[at_home].mean() < scores[~at_home].mean() - 1


def test_values_that_a_list_repeats_count_as_often() -> None:
    """Users of `b|b|a` take as users of a third of a and two thirds of b."""
    lists = [("b|b|a" if u % 2 else "c|a") for u in range(USERS)]
    people = users().with_columns(clubs=pl.Series(lists))
    features = *FEATURES, MultiHot(name="clubs", side="user", separator="|")
    data = world(features, people)
    found = factors_before(Trainer(data, of(["clubs"], ["place"])).run().model, data, VALIDATION)
    pairs = data.pairs.take(data.parts == TRAIN)
    odd, places = (data.side(side).ids.cast(pl.Int64).to_numpy() for side in ("user", "item"))
    shares = np.where((odd % 2 == 1)[:, None], [1 / 3, 2 / 3, 0], [1 / 2, 0, 1 / 2])
    counts = np.zeros((3, TOWNS))
    np.add.at(counts.T, places[pairs.item] % TOWNS, shares[pairs.user])
    logs = np.log((counts + 5) / (np.outer(counts.sum(1), counts.sum(0)) / counts.sum() + 5))
    expected = shares @ logs[:, places % TOWNS]
    np.testing.assert_allclose((found.users @ found.items.T).numpy(), expected, rtol=1e-3, atol=1e-4)


def test_columns_that_tell_nothing_take_no_dimensions_from_those_that_tell() -> None:
    rng = np.random.default_rng(9)
    noise = {f"n{n}": rng.integers(0, 12, USERS) for n in range(12)}
    people = users().with_columns(**{name: pl.Series(values) for name, values in noise.items()})
    features = *FEATURES, *(Categorical(name=name, side="user") for name in noise)
    alone = ndcg(world(), of(["town"], ["item_id", "place"], width=16))
    among = ndcg(world(features, people), of(["town", *noise], ["item_id", "place"], width=16))
    assert among > 0.8 * alone


@pytest.mark.parametrize("flipped", [False, True])
def test_columns_of_many_values_on_either_side_are_solved_by_the_other(flipped: bool) -> None:
    """A column of 400 values against one of 6 gives the scores of the logarithms, whichever side it is of."""
    rng, many = np.random.default_rng(2), 400
    shares = rng.dirichlet(np.ones(TOWNS), many)
    counts = torch.from_numpy(rng.poisson(20 * shares).astype(np.float64))
    counts = counts.T.contiguous() if flipped else counts
    rows, columns, total = counts.sum(1, keepdim=True), counts.sum(0), counts.sum()
    expected = ((counts + 5) / (rows * columns / total + 5)).log()
    found = leading(counts.clone(), 5.0, 8)
    assert found.users.shape[1] == TOWNS
    torch.testing.assert_close(found.users @ found.items.T, expected.float(), rtol=1e-3, atol=1e-4)
    assert (found.strengths.diff() <= 0).all()
