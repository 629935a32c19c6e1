"""Choices of users of validation: which rows and items are drawn, and weights that have a prior or none."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import torch

from twotower.data.dataset import Dataset, build_dataset
from twotower.data.recent_popularity import PopularityTerms
from twotower.data.split import SplitConfig
from twotower.data.splits import TEST, VALIDATION
from twotower.data.tables import check
from twotower.evaluation.factors import Factors
from twotower.evaluation.recent_scores import RecentScores
from twotower.features.categorical import Categorical
from twotower.features.schema import Schema
from twotower.train.choices import FEWEST_ITEMS, MAX_ITEMS, MAX_NUMBERS, MAX_ROWS, MIN_ROWS, Choices

N_ITEMS = 40


def log(n_users: int, n_items: int = N_ITEMS) -> Dataset:
    """Two rows of training and one of validation of each user, at the times of the rows; some users take again what
    they have."""
    rng = np.random.default_rng(0)
    items = rng.integers(0, n_items, (n_users, 3))
    items[::7, 2] = items[::7, 0]
    frame = pl.DataFrame(
        {
            "user_id": np.repeat(np.arange(n_users), 3),
            "item_id": items.ravel(),
            "part": ["train", "train", "validation"] * n_users,
            "at": rng.permutation(3 * n_users) + 1_600_000_000,
        }
    )
    frame = pl.concat([frame, frame.tail(1).with_columns(part=pl.lit("test"))])
    ids = Categorical(name="user_id", side="user"), Categorical(name="item_id", side="item")
    schema = Schema(features=ids, duplicates="keep", time="at")
    tables = check(None, pl.DataFrame({"item_id": np.arange(n_items)}), frame, schema)
    return build_dataset(tables, schema, SplitConfig(kind="column", column="part"))


@pytest.mark.parametrize("n_terms", [3, 2000])
def test_each_user_has_what_is_taken_anew_and_items_that_it_may_have_been(n_terms: int) -> None:
    """With 2,000 terms fewer rows are read."""
    data, n_items = log(400), N_ITEMS
    later = data.parts.copy()
    later[data.pairs.item == 3] = TEST
    data = replace(data, parts=later)
    choices = Choices.of(data, 0, n_terms)
    assert choices is not None
    n = min(MAX_NUMBERS // (n_terms * (n_items + 1)), len(choices.users))
    assert choices.candidates.shape == choices.left_out.shape == (n, n_items + 1)
    train = {(u, i) for u, i in zip(data.train.user.tolist(), data.train.item.tolist(), strict=True)}
    validation = {(u, i) for u, i in zip(data.validation.user.tolist(), data.validation.item.tolist(), strict=True)}
    for user, own, items, left_out in zip(
        choices.users.tolist(), choices.items.tolist(), choices.candidates, choices.left_out, strict=True
    ):
        assert (user, own) in validation - train
        assert items[0] == own
        assert not left_out[0]
        for item, is_left in zip(items[1:].tolist(), left_out[1:].tolist(), strict=True):
            assert is_left == (item in (own, 3) or (user, item) in train)


def test_few_rows_are_none() -> None:
    some = log(MIN_ROWS // 2)
    assert Choices.of(some, 0, 3) is None
    assert Choices.of(log(4 * MIN_ROWS), 0, 3) is not None
    assert Choices.of(log(4 * MIN_ROWS), 0, MAX_NUMBERS // (MIN_ROWS * 20)) is None, "the terms leave too few rows"


@pytest.mark.parametrize("n_terms", [3, 50, 1000])
def test_items_are_drawn_where_there_are_many(n_terms: int) -> None:
    choices = Choices.of(log(3000, 5 * MAX_ITEMS), 0, n_terms)
    assert choices is not None
    most = min(MAX_ITEMS, max(FEWEST_ITEMS, MAX_NUMBERS // (n_terms * MAX_ROWS)))
    assert len(choices.compared) == len(np.unique(choices.compared)) == most
    assert len(choices.users) * (most + 1) * n_terms <= MAX_NUMBERS


def test_terms_are_the_scores_of_the_candidates() -> None:
    data, generator = log(400), torch.Generator().manual_seed(0)
    found = Factors(*(torch.randn(n, 4, generator=generator) for n in (400, N_ITEMS)))
    choices = Choices.of(data, 0, 3)
    assert choices is not None
    pairs = choices.users[:, None], choices.candidates
    dimensions = torch.tensor([2, 0])
    (products,) = choices.products(found, [dimensions])
    wanted = found.users[:, dimensions] @ found.items[:, dimensions].T
    torch.testing.assert_close(products, wanted[pairs])
    recent = RecentScores.of_part(
        data, VALIDATION, PopularityTerms(20.0, 1.0, -0.5, 0.3, 0.1), np.zeros(N_ITEMS, np.float32)
    )
    popular = recent.added_to(torch.zeros(400, N_ITEMS), np.arange(400))
    torch.testing.assert_close(choices.popularity(recent), popular[pairs])
    of_items = torch.arange(N_ITEMS) > 9
    torch.testing.assert_close(choices.of_items(of_items), of_items.float()[torch.from_numpy(choices.candidates)])


def test_users_and_items_with_versions_have_the_vectors_of_the_one_that_holds_after_training() -> None:
    """Each has three, the second from the middle of the log on, the last after its end."""
    frame = log(400)
    rows = frame.items.frame.height
    assert rows == N_ITEMS
    starts = [None, 1_600_000_600, 1_700_000_000]
    assert frame.times is not None
    ids = Categorical(name="user_id", side="user"), Categorical(name="item_id", side="item")
    schema = Schema(features=ids, duplicates="keep", time="at", valid_from="since")
    pairs = frame.pairs
    interactions = pl.DataFrame(
        {
            "user_id": frame.users.ids[pairs.user],
            "item_id": frame.items.ids[pairs.item],
            "at": frame.times // 1_000_000,
            "part": [("train", "validation", "test")[part] for part in frame.parts.tolist()],
        }
    )
    users, items = (
        pl.DataFrame({name: np.repeat(np.arange(n), 3), "since": starts * n})
        for name, n in (("user_id", 400), ("item_id", N_ITEMS))
    )
    tables = check(users, items, interactions, schema)
    data = build_dataset(tables, schema, SplitConfig(kind="column", column="part"))
    assert len(data.users.by_version()) == 1200
    choices = Choices.of(data, 0, 3)
    assert choices is not None
    vectors = [torch.arange(3.0 * n)[:, None] for n in (400, N_ITEMS)]
    (found,) = choices.products(Factors(*vectors), [torch.tensor([0])])
    of_users, of_items = (3.0 * torch.from_numpy(rows) + 1 for rows in (choices.users, choices.candidates))
    torch.testing.assert_close(found, of_users[:, None] * of_items, check_dtype=False)


def test_a_free_weight_has_no_prior_that_holds_it() -> None:
    """Users take as if an item's number, which is small, weighed much."""
    data, choices = log(400), Choices.of(log(400), 0, 3)
    assert choices is not None
    generator = torch.Generator().manual_seed(0)
    number = torch.randn(N_ITEMS, generator=generator)
    taken = torch.zeros(len(data.items))
    taken[torch.from_numpy(choices.items)] += 1
    number[: N_ITEMS // 2] -= 2.0
    own = choices.of_items(number)
    rest = torch.randn(own.shape, generator=generator)
    own[:, 0] = 2.0
    held, free = (choices.weights([rest, own / 1000], n_free=n) for n in (0, 1))
    assert held is not None
    assert free is not None
    assert 0 < held.factors[0] < 20
    assert free.factors[0] > 500
    assert choices.weights([torch.ones(own.shape), own]) is None, "nothing beside it"
