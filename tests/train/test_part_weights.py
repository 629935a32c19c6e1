"""Weights of parts of a pair beside the others: choices drawn by known weights, and what is not compared."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import torch

from twotower.data.dataset import Dataset, build_dataset
from twotower.data.recent_popularity import PopularityTerms, RecentPopularity
from twotower.data.split import SplitConfig
from twotower.data.splits import TEST, TRAIN, VALIDATION
from twotower.data.tables import check
from twotower.evaluation.factors import Factors
from twotower.evaluation.recent_scores import RecentScores
from twotower.features.categorical import Categorical
from twotower.features.schema import Schema
from twotower.train.choices import MAX_ITEMS, MIN_ROWS
from twotower.train.part_weights import part_weights


def weights_of(found: Factors, data: Dataset) -> list[float] | None:
    """The factors, whose spreads are those of the scores by them."""
    weights = part_weights(found, PARTS, data, 1)
    if weights is None:
        return None
    others = (found.users[:, :2] @ found.items[:, :2].T).std()
    for part, factor, spread in zip(PARTS, *weights, strict=True):
        of_part = float((found.users[:, part] @ found.items[:, part].T).std() / others)
        assert spread == pytest.approx(factor * of_part, rel=0.1, abs=0.01)
    return weights.factors


PARTS = [torch.tensor([2, 3]), torch.tensor([4]), torch.tensor([5])]


def vectors(n_users: int, n_items: int) -> Factors:
    """Two numbers of the other pairs, and parts of two numbers and of one each."""
    generator = torch.Generator().manual_seed(3)
    return Factors(*(torch.randn(n, 6, generator=generator) for n in (n_users, n_items)))


def taken(
    found: Factors, weights: list[float], again: bool = False, best_first: bool = False, has_times: bool = False
) -> Dataset:
    """A row of each user in training, drawn at random or that of the best second part, and another one in validation
    drawn by the scores under these weights; or that of training `again`."""
    of_items = found.items.clone()
    for part, weight in zip(PARTS, weights, strict=True):
        of_items[:, part] *= weight
    rng = np.random.default_rng(5)
    odds = (found.users @ of_items.T).double().numpy() + rng.gumbel(size=(len(found.users), len(of_items)))
    first = rng.integers(0, len(of_items), len(odds))
    if best_first:
        first = (found.users[:, 4:5] @ found.items[:, 4:5].T).argmax(1).numpy()
    odds[np.arange(len(odds)), first] = -np.inf
    users = np.arange(len(odds))
    frame = pl.DataFrame(
        {
            "user_id": [*users, *users],
            "item_id": [*first, *(first if again else odds.argmax(1))],
            "part": ["train"] * len(odds) + ["validation"] * len(odds),
        }
    )
    frame = pl.concat([frame, pl.DataFrame({"user_id": [0], "item_id": [0], "part": ["test"]})])
    ids = Categorical(name="user_id", side="user"), Categorical(name="item_id", side="item")
    schema = Schema(features=ids, duplicates="keep")
    if has_times:  # in the order of the rows
        frame = frame.with_row_index("at").with_columns(at=pl.col("at").cast(pl.Int64) + 1_600_000_000)
        schema = schema.model_copy(update={"time": "at"})
    items = pl.DataFrame({"item_id": np.arange(len(of_items))})
    data = build_dataset(check(None, items, frame, schema), schema, SplitConfig(kind="column", column="part"))
    assert data.items.ids.to_list() == [*range(len(of_items))]
    assert data.users.ids.to_list() == [*range(len(odds))]
    return data


@pytest.mark.parametrize("n_items", [40, MAX_ITEMS + 500])
def test_weights_are_those_by_which_users_take(n_items: int) -> None:
    found = vectors(2000, n_items)
    assert weights_of(found, taken(found, [2.0, -0.5, 0.0])) == pytest.approx([2.0, -0.5, 0.0], abs=0.2)


def test_the_scale_of_a_part_changes_its_weight_and_not_its_scores() -> None:
    found = vectors(1000, 40)
    data = taken(found, [1.0, 0.5, 0.0])
    once = weights_of(found, data)
    scaled = found.items.clone()
    scaled[:, 4] *= 1000
    thousandth = weights_of(Factors(found.users, scaled), data)
    assert once is not None
    assert thousandth is not None
    assert thousandth == pytest.approx([once[0], once[1] / 1000, once[2]], rel=0.01, abs=0.001)


@pytest.mark.parametrize("n_items", [5, 40])
def test_an_item_that_the_user_has_is_compared_with_none_and_the_own_item_is_not_compared_twice(n_items: int) -> None:
    found = vectors(4000, n_items)
    weights = weights_of(found, taken(found, [2.0, 0.0, 0.0], best_first=True))
    assert weights == pytest.approx([2.0, 0.0, 0.0], abs=0.1)


def test_a_part_of_small_scores_is_held_to_the_odds_that_they_are() -> None:
    """Users take as if the second part weighed 500; a normal prior of the factors themselves lets it have a few."""
    found = vectors(60, 40)
    data = taken(found, [1.0, 0.5, 0.0])
    found.items[:, 4] /= 1000
    weights = weights_of(found, data)
    assert weights is not None
    assert 0 <= weights[1] < 10


def test_a_part_that_is_the_same_for_all_items_tells_nothing() -> None:
    found = vectors(200, 40)
    found.items[:, 5] = 0.0
    weights = weights_of(found, taken(found, [1.0, 1.0, 1.0]))
    assert weights is not None
    assert weights[2] == 0.0


def test_what_users_take_again_is_not_compared() -> None:
    found = vectors(200, 40)
    assert part_weights(found, PARTS, taken(found, [1.0, 1.0, 1.0], again=True), 1) is None


def test_few_rows_tell_too_little() -> None:
    for users, is_fitted in ((MIN_ROWS - 1, False), (MIN_ROWS, True)):
        found = vectors(users, 40)
        assert (part_weights(found, PARTS, taken(found, [1.0, 1.0, 1.0]), 1) is not None) == is_fitted


def test_other_pairs_that_tell_nothing_give_no_scale() -> None:
    found = vectors(200, 40)
    data = taken(found, [1.0, 1.0, 1.0])
    found.items[:, :2] = 0.0
    assert part_weights(found, PARTS, data, 1) is None


def test_weights_are_those_beside_what_is_popular() -> None:
    found, weights = vectors(2000, 40), [2.0, -0.5, 0.0]
    found.items[:, 3] = torch.arange(40) / 20  # the popular ones are those that the first part likes
    found.users[:, 3] = 1.0
    data = taken(found, weights, has_times=True, best_first=True)
    terms = PopularityTerms(1e9, 2.0)
    recent = RecentScores.of_part(data, VALIDATION, terms, np.zeros(40, np.float32))
    counts = RecentPopularity.before(data, VALIDATION).scores_at_end(terms)
    as_number = Factors(
        torch.cat([found.users, torch.ones(2000, 1)], 1),
        torch.cat([found.items, torch.from_numpy(counts).float()[:, None]], 1),
    )
    beside = part_weights(replace(found, recent=recent), PARTS, data, 1)
    assert beside is not None
    twin = part_weights(as_number, PARTS, data, 1)
    assert twin is not None
    assert beside.factors == pytest.approx(twin.factors, rel=1e-3, abs=1e-3)
    alone = part_weights(found, PARTS, data, 1)
    assert alone is not None
    assert abs(alone.factors[1] - beside.factors[1]) > 0.05


def test_columns_do_not_tell_which_items_are_cold() -> None:
    """Cold items are taken seldom, as their scores lack what an id adds, until a bias raises them."""
    found, cold = vectors(2000, 40), np.arange(40) % 3 == 0
    found.users[:, 4], found.items[:, 4] = 1.0, torch.from_numpy(cold).float()
    data = taken(found, [2.0, -3.0, 0.5])
    blind, told = (part_weights(found, PARTS, data, 1, which) for which in (None, cold))
    assert blind is not None
    assert told is not None
    assert blind.factors[1] < -2
    assert abs(told.factors[1]) < 0.2
    assert told.factors[::2] == pytest.approx([2.0, 0.5], abs=0.2)


def test_items_that_are_not_there_yet_are_not_compared() -> None:
    found, later = vectors(2000, 40), np.arange(40) % 4 == 1
    found.users[:, 4], found.items[:, 4] = 1.0, torch.from_numpy(later).float()
    data = taken(found, [2.0, -100.0, 0.5])  # nobody takes them in validation; in training some do at first
    train = data.parts == TRAIN
    parts = np.where(train & later[data.pairs.item], TEST, data.parts)
    weights = part_weights(found, PARTS, replace(data, parts=parts), 1)
    assert weights is not None
    assert weights.factors == pytest.approx([2.0, 0.0, 0.5], abs=0.2)


def test_popularity_has_a_weight_of_its_own_the_last_one() -> None:
    found, popular = vectors(2000, 40), torch.arange(40) / 20
    found.users[:, 5], found.items[:, 5] = 1.0, popular
    data = taken(found, [2.0, -0.5, 1.5])
    found.items[:, 5] = 0.0
    weights = part_weights(found, PARTS[:2], data, 1, None, popular)
    assert weights is not None
    assert weights.factors == pytest.approx([2.0, -0.5, 1.5], abs=0.2)
    others = (found.users[:, :2] @ found.items[:, :2].T).std()
    assert weights.spreads[2] == pytest.approx(weights.factors[2] * float(popular.std() / others), rel=0.1)
