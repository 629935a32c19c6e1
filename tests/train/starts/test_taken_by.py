"""Start `taken_by` in a log of people who follow one another, most of them back."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl
import pytest
from worlds import settings

import twotower
from twotower.config.experiment import Config
from twotower.data.dataset import Dataset, build_dataset
from twotower.data.split import SplitConfig
from twotower.data.splits import TEST
from twotower.data.tables import check
from twotower.errors import ConfigError, TrainingError
from twotower.features.categorical import Categorical
from twotower.features.schema import Schema
from twotower.features.sequence import Sequence
from twotower.train.factors import factors_before
from twotower.train.trainer import Trainer

PEOPLE = 120


def follows(prefix: str = "p") -> pl.DataFrame:
    """Pairs of who follows whom, nine in ten of them back."""
    rng = np.random.default_rng(0)
    pairs = [(u, int(v)) for u in range(PEOPLE) for v in rng.permutation(PEOPLE)[:8] if u != v]
    pairs += [(v, u) for u, v in pairs if rng.random() < 0.9]
    users, items = ([f"{before}{one[at]}" for one in pairs] for at, before in ((0, "p"), (1, prefix)))
    return (
        pl.DataFrame({"user_id": users, "item_id": items})
        .unique(maintain_order=True)
        .sample(fraction=1.0, shuffle=True, seed=1)
    )


def world(prefix: str = "p") -> Dataset:
    features = (
        Sequence(name="history", side="user", share_embedding=False, pooling={"kind": "sum"}),
        Categorical(name="user_id", side="user"),
        Categorical(name="item_id", side="item"),
    )
    schema, split = Schema(features=features), SplitConfig(kind="random")
    return build_dataset(check(None, None, follows(prefix), schema), schema, split)


def config(width: int, starts: list[dict[str, Any]], user: str = "user_id") -> Config:
    of_items: dict[str, Any] = {"fields": ["item_id"], "layers": []}
    pairs: list[dict[str, Any]] = [{"user": {"fields": ["history"], "layers": []}, "item": of_items}]
    pairs += [{"user": {"fields": [user], "width": width, "layers": []}, "item": of_items | {"width": width}}]
    return settings(
        model={
            "width": PEOPLE,
            "similarity": "dot",
            "bias": False,
            "temperature": 1.0,
            "pairs": pairs[:1] if starts[0]["kind"] == "ease" and len(starts) == 1 else pairs[-len(starts) :],
        },
        loss={"kind": "softmax"},
        negatives={"full": True},
        train={"epochs": 0, "start": starts, "monitor": "validation.recall@5", "device": "cpu"},
    )


def found(width: int, starts: list[dict[str, Any]]) -> float:
    """Return the recall@5 of the test part."""
    data = world()
    tables = (None, None, follows())
    run = twotower.fit(tables, data.schema, config(width, starts).model_copy(update={"split": data.split}))
    return float(run.metrics["test.recall@5"])


def test_followers_who_are_not_followed_yet_stand_first_by_axes_and_nearly_so_by_signs() -> None:
    exact, rough = (found(width, [{"kind": "taken_by"}]) for width in (PEOPLE, 64))
    assert exact > 0.6
    assert rough > 0.7 * exact


def test_beside_another_pair_it_is_weighed_by_validation() -> None:
    ease: dict[str, Any] = {"kind": "ease", "regularization": [10.0]}
    both: list[dict[str, Any]] = [ease, {"kind": "taken_by", "pair": 1, "blend": [0.0, 0.3, 1.0]}]
    assert found(PEOPLE, both) > found(PEOPLE, [ease]) + 0.3


def test_users_and_items_of_other_ids_have_nothing_to_tell() -> None:
    with pytest.raises(TrainingError, match="finds no user that is an item too and took another one"):
        Trainer(world("film "), config(PEOPLE, [{"kind": "taken_by"}])).run()


def test_other_fields_than_the_ids_are_refused() -> None:
    with pytest.raises(
        ConfigError,
        match=r"needs one field in model.pairs.0.user.fields, the categorical feature of the user ids; it has history",
    ):
        Trainer(world(), config(PEOPLE, [{"kind": "taken_by"}], user="history"))


def test_a_user_of_no_item_has_scores_of_zero() -> None:
    data = world()
    model = Trainer(data, config(PEOPLE, [{"kind": "taken_by"}])).run().model.eval()
    vectors = factors_before(model, data, TEST)
    assert not model.towers("user")[0].embeddings.rows_of("user_id")[0].any(), "an unknown user"
    assert vectors.users.shape == (len(data.users), PEOPLE)


def test_ids_that_nobody_took_need_no_direction() -> None:
    """Forty more people follow others and stand in the table of items, and nobody follows them."""
    more = pl.DataFrame({"user_id": [f"q{n}" for n in range(40)], "item_id": [f"p{n}" for n in range(40)]})
    rows = pl.concat([follows(), more])
    items = pl.DataFrame({"item_id": rows["user_id"].unique(maintain_order=True)})
    schema, split = world().schema, SplitConfig(kind="random")
    data = build_dataset(check(None, items, rows, schema), schema, split)
    exact, wide = (Trainer(data, config(width, [{"kind": "taken_by"}])).run().model for width in (PEOPLE, 2 * PEOPLE))
    of_exact, of_wide = (factors_before(model.eval(), data, TEST) for model in (exact, wide))
    np.testing.assert_allclose(of_exact.users @ of_exact.items.T, of_wide.users @ of_wide.items.T, atol=1e-6)
