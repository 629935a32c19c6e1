"""Parts of the ids of items."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest

import twotower
from twotower.arrays.types import Ints
from twotower.suggestion.id_parts import IdParts, id_parts
from twotower.suggestion.suggest import suggest

KINDS = [f"{one}{other}" for one in "bdfgk" for other in "aeiou"]


def world(share: float = 0.8, separator: str = "/", n_items: int = 2000) -> tuple[Ints, Ints, pl.Series]:
    """Return rows of 400 users, who take items of their two kinds with this probability, and the ids of items, which begin with one of 25 kinds."""
    rng = np.random.default_rng(0)
    kinds = np.arange(n_items) % len(KINDS)
    users = np.repeat(np.arange(400), 8)
    liked = rng.integers(len(KINDS), size=(400, 2))[users, rng.integers(2, size=len(users))]
    kind = np.where(rng.random(len(users)) < share, liked, rng.integers(len(KINDS), size=len(users)))
    items = kind + len(KINDS) * rng.integers(n_items // len(KINDS), size=len(users))
    return users, items, pl.Series([f"{KINDS[k]}{separator}x{i}" for i, k in enumerate(kinds)])


@pytest.mark.parametrize("separator", ["/", ".", "-", "_", ":", " "])
def test_parts_that_items_of_a_user_share_are_found(separator: str) -> None:
    users, items, ids = world(separator=separator)
    assert id_parts(users, items, ids) == IdParts((separator,), len(KINDS) + len(ids))


def test_parts_that_tell_nothing_are_none() -> None:
    users, items, ids = world(share=0.0)
    assert id_parts(users, items, ids) == IdParts(), "by chance alone"
    users, items, ids = world()
    assert id_parts(users, items, pl.Series(range(len(ids)))) == IdParts(), "numbers"
    assert id_parts(users, items, ids.str.replace("/", "")) == IdParts(), "no separator"
    assert id_parts(users, items, "all/" + ids.str.replace("/", "")) == IdParts(), "a part of all"
    assert id_parts(np.arange(len(users)), items, ids) == IdParts(), "a row of each user"
    assert id_parts(users, items, pl.Series([None, *ids[1:]])) == IdParts(), "a gap"


def test_parts_tell_from_each_threshold_on() -> None:
    """Of items of one kind alone users share 4 % of the parts by chance, and from .4 on 5 points more; with parts beside it that tell nothing, 21 %,
    and from .5 on 1.4 times as many."""
    rng, shares = np.random.default_rng(2), [step / 10 for step in range(11)]
    beside = pl.Series([f"r{one}/s{other}/" for one, other in rng.integers(11, size=(2000, 2))])
    worlds = [world(share) for share in shares]
    alone = [share for share, given in zip(shares, worlds, strict=True) if id_parts(*given).separators]
    many = [share for share, (u, i, ids) in zip(shares, worlds, strict=True) if id_parts(u, i, beside + ids).separators]
    assert (alone, many) == (shares[4:], shares[5:])


def test_rows_of_all_users_tell() -> None:
    users, items, ids = world()
    first = np.random.default_rng(1).integers(len(ids), size=25_000)  # one user, who takes anything
    many = np.concatenate([np.zeros(len(first), np.int64), *(1 + users + 400 * i for i in range(10))])
    assert id_parts(many, np.concatenate([first, *[items] * 10]), ids).separators == ("/",)


def test_ids_of_more_parts_than_a_closed_form_solves_for_have_none() -> None:
    users, items, ids = world(n_items=9_975)
    assert id_parts(users, items, ids).values == 10_000
    assert id_parts(users, items, pl.concat([ids, pl.Series(["ba/more"])])) == IdParts()


def test_parts_of_ids_are_columns_of_a_recipe_of_closed_forms() -> None:
    users, items, ids = world(n_items=500)
    rows = pl.DataFrame({"user_id": users, "item_id": ids.gather(items)})
    plain = rows.with_columns(pl.col("item_id").str.replace("/", ""))
    quick = ["model.width=16", "train.start.0.regularization=[0.02]", "train.start.0.unobserved=[0.1]", "train.start.0.popularity=[0.0]", "train.start.1.regularization=[100.0]"]  # fmt: skip
    found, other = suggest(rows, overrides=quick), suggest(plain, overrides=quick)
    assert found.recipe == other.recipe == "collaborative"
    (parts,) = [f for f in found.schema.features if f.name == "item_id_parts1"]
    assert (parts.kind, parts.source, parts.side) == ("multi_hot", "item_id", "item")
    assert {"content", "next_content"} <= {start.kind for start in found.config.train.start}
    assert not any("parts" in f.name for f in other.schema.features)
    metrics = twotower.fit((None, None, rows), found.schema, found.config).metrics
    without = twotower.fit((None, None, plain), other.schema, other.config).metrics
    assert metrics["test.ndcg@10"] > 1.1 * without["test.ndcg@10"]


def test_parts_of_ids_take_no_name_of_a_column() -> None:
    users, items, ids = world(n_items=500)
    rows = pl.DataFrame({"user_id": users, "item_id": ids.gather(items)})
    table = pl.DataFrame({"item_id": ids, "item_id_parts1": ["old", "new"] * 250})
    names = [f.name for f in suggest(rows, items=table).schema.features]
    assert {"item_id_parts1", "item_id_parts2"} <= {*names}
