"""Choices of users of validation: which rows and candidates are drawn, and what a term is of them."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import torch

from twotower.data.dataset import Dataset, build_dataset
from twotower.data.split import SplitConfig
from twotower.data.splits import TEST, VALIDATION
from twotower.data.tables import check
from twotower.evaluation.config import Repeats
from twotower.evaluation.factors import Factors
from twotower.features.categorical import Categorical
from twotower.features.schema import Schema
from twotower.scorers.choices import MAX_ITEMS, MAX_OWN, MAX_ROWS, MIN_ROWS, Choices
from twotower.scorers.recent_popularity import PopularityTerms
from twotower.scorers.trending import RecentScores

N_ITEMS = 40
IDS = Categorical(name="user_id", side="user"), Categorical(name="item_id", side="item")
SCHEMA = Schema(features=IDS, duplicates="keep", time="at")
COLUMN = SplitConfig(kind="column", column="part")


def rows(n_users: int, n_items: int = N_ITEMS, length: int = 2) -> pl.DataFrame:
    """Rows of training and one of validation of each user, at times of their own; some users take again what they
    have."""
    rng = np.random.default_rng(0)
    items = rng.integers(0, n_items, (n_users, length + 1))
    items[::4, -1] = items[::4, 0]
    frame = pl.DataFrame(
        {
            "user_id": np.repeat(np.arange(n_users), length + 1),
            "item_id": items.ravel(),
            "part": (["train"] * length + ["validation"]) * n_users,
            "at": rng.permutation((length + 1) * n_users) + 1_600_000_000,
        }
    )
    return pl.concat([frame, frame.tail(1).with_columns(part=pl.lit("test"))])


def log(n_users: int, n_items: int = N_ITEMS, length: int = 2) -> Dataset:
    items = pl.DataFrame({"item_id": np.arange(n_items)})
    return build_dataset(check(None, items, rows(n_users, n_items, length), SCHEMA), SCHEMA, COLUMN)


def pairs_of(data: Dataset, part: str) -> set[tuple[int, int]]:
    of = data.train if part == "train" else data.validation
    return {*zip(of.user.tolist(), of.item.tolist(), strict=True)}


@pytest.mark.parametrize("repeats", ["exclude", "allow", "only"])
def test_each_row_has_the_item_taken_and_all_others_that_are_ranked(repeats: Repeats) -> None:
    """Nobody can take item 3 yet, which the test part alone has."""
    data = log(400)
    parts = data.parts.copy()
    parts[data.pairs.item == 3] = TEST
    data = replace(data, parts=parts)
    train, validation = pairs_of(data, "train"), pairs_of(data, "validation")
    fits = {"exclude": validation - train, "allow": validation, "only": validation & train}[repeats]
    choices = Choices.of(data, 0, repeats)
    assert choices is not None
    each = zip(choices.users.tolist(), choices.candidates.tolist(), choices.offsets.tolist(), strict=True)
    seen = list[tuple[int, int]]()
    for user, candidates, offsets in each:
        seen.append((user, candidates[0]))
        of_user = {item for other, item in train if other == user}
        ranked = {"exclude": {*range(N_ITEMS)} - of_user, "allow": {*range(N_ITEMS)}, "only": of_user}[repeats]
        kept = [item for item, offset in zip(candidates, offsets, strict=True) if offset > -np.inf]
        assert sorted(kept) == sorted(ranked - {3})
        assert {*offsets} <= {0.0, -np.inf}
    assert sorted(seen) == sorted(fits)
    assert data.pairs.user[choices.interactions].tolist() == [user for user, _ in seen]
    assert data.pairs.item[choices.interactions].tolist() == [item for _, item in seen]


def test_few_rows_are_none() -> None:
    """In three of four rows a user takes a new item."""
    assert Choices.of(log(MIN_ROWS), 0, "exclude") is None
    assert Choices.of(log(MIN_ROWS), 0, "only") is None
    assert Choices.of(log(MIN_ROWS), 0, "allow") is not None
    assert Choices.of(log(2 * MIN_ROWS), 0, "exclude") is not None


def test_a_sample_of_rows_and_items_stands_for_all() -> None:
    n_items, length = 5 * MAX_ITEMS, 3 * MAX_OWN
    data = log(MAX_ROWS + 500, n_items, length)
    choices = Choices.of(data, 0, "allow")
    assert choices is not None
    assert len(choices.users) == len(np.unique(choices.users)) == MAX_ROWS
    compared = slice(1, 1 + MAX_ITEMS)
    assert len(np.unique(choices.candidates[0, compared])) == MAX_ITEMS
    offsets = np.exp(choices.offsets.astype(np.float64))
    assert {*offsets[:, compared].ravel().round(6)} == {0.0, 5.0}
    own = data.seen_items.lengths[choices.users]
    repeats = choices.candidates[:, 1 + MAX_ITEMS :]
    for row in range(20):
        counts = Counter(repeats[row].tolist())
        assert [*counts.values()] == [1] * MAX_OWN
        assert counts.keys() <= {*data.seen_items.row(int(choices.users[row])).tolist()}
    numbers = offsets[:, 1 + MAX_ITEMS :]
    is_own = repeats == choices.candidates[:, :1]
    np.testing.assert_allclose(numbers, np.where(is_own, 0.0, own[:, None] / MAX_OWN), rtol=1e-6)
    assert is_own.any()


def test_candidates_that_are_left_out_are_compared_with_none() -> None:
    choices = Choices.of(log(400), 0, "exclude")
    assert choices is not None
    left_out = choices.candidates < 20
    found = choices.without(left_out)
    assert np.array_equal(found.candidates, choices.candidates)
    assert (found.offsets[:, 0] == 0).all()
    wanted = np.where(left_out, -np.inf, choices.offsets)[:, 1:]
    assert np.array_equal(found.offsets[:, 1:], wanted)


def test_terms_are_the_scores_of_the_candidates() -> None:
    data, generator = log(400), torch.Generator().manual_seed(0)
    found = Factors(*(torch.randn(n, 4, generator=generator) for n in (400, N_ITEMS)))
    choices = Choices.of(data, 0, "allow")
    assert choices is not None
    every, pairs = found.users @ found.items.T, (choices.users[:, None], choices.candidates)
    torch.testing.assert_close(choices.products(found.users, found.items), every[pairs])
    held = np.zeros(N_ITEMS, np.float32)
    recent = RecentScores.of_part(data, VALIDATION, PopularityTerms(20.0, 1.0, -0.5, 0.3, 0.1), held)
    torch.testing.assert_close(choices.scores(replace(found, added=(recent,))), every[pairs])
    popular = recent.added_to(torch.zeros(400, N_ITEMS), np.arange(400))
    torch.testing.assert_close(choices.of_pairs(recent.of_pairs), popular[pairs])
    numbers = torch.randn(N_ITEMS, generator=generator)
    torch.testing.assert_close(choices.of_items(numbers), numbers[torch.from_numpy(choices.candidates)])


def test_closed_forms_have_the_version_after_training_and_scores_that_of_the_time() -> None:
    """Each user and item has three versions, the second from the middle of the log on, the last after its end."""
    starts, n_users = [None, 1_600_000_600, 1_700_000_000], 400
    schema = Schema(features=IDS, duplicates="keep", time="at", valid_from="since")
    users, items = (
        pl.DataFrame({name: np.repeat(np.arange(n), 3), "since": starts * n})
        for name, n in (("user_id", n_users), ("item_id", N_ITEMS))
    )
    data = build_dataset(check(users, items, rows(n_users), schema), schema, COLUMN)
    choices = Choices.of(data, 0, "exclude")
    assert choices is not None
    found = Factors(*(torch.arange(3.0 * n)[:, None] for n in (n_users, N_ITEMS)))
    is_second = data.times[choices.interactions] >= 1_600_000_600 * 1_000_000
    assert 0 < is_second.sum() < len(is_second)
    for scores, version in (
        (choices.products(found.users, found.items), 1),
        (choices.scores(found), is_second[:, None]),
    ):
        wanted = (3 * choices.users[:, None] + version) * (3 * choices.candidates + version)
        torch.testing.assert_close(scores, torch.from_numpy(wanted), check_dtype=False)
