"""Scores of pairs by vectors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scored import random_factors

from twotower.data.dataset import Dataset
from twotower.evaluation.factors import SINGLE_DIMENSIONS, Factors


def test_pairs_are_scored_alike_however_many_at_a_time(everything_data: Dataset) -> None:
    pairs, factors = everything_data.train, random_factors(everything_data)
    expected = (factors.users[pairs.user] * factors.items[pairs.item]).sum(1).numpy()
    for block in (1, 7, len(pairs)):
        assert np.array_equal(factors.scores(pairs, block), expected)


@pytest.mark.parametrize(
    ("shared", "per_item", "split"),
    [(8, 1, True), (0, 1, True), (8, 0.9, True), (8, 2, True), (8, 0.5, False), (600, 1, False)],
)
def test_dimensions_of_one_item_are_added_to_the_scores(shared: int, per_item: float, split: bool) -> None:
    """Items have an axis each, none or two; with too few axes, or many others, a product gives the scores."""
    generator, n = torch.Generator().manual_seed(0), SINGLE_DIMENSIONS + 90
    users = torch.randn(30, shared + 2 * n, generator=generator)
    items = torch.zeros(n, shared + 2 * n)
    items[:, :shared] = torch.randn(n, shared, generator=generator)
    order = torch.randperm(n, generator=generator)
    for turn in range(max(1, int(per_item))):
        own = order[: round(n * min(per_item, 1))]
        items[own, shared + turn * n + own] = 1 + torch.rand(len(own), generator=generator)
    factors, rows = Factors(users, items), np.array([3, 29, 3, 0])
    expected = (users.double() @ items.double().T).numpy()
    np.testing.assert_allclose(factors.catalogue_scores(rows), expected[rows], rtol=1e-4, atol=1e-4)
    assert (factors._split is not None) == split


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@pytest.mark.parametrize("side", ["users", "items"])
def test_a_vector_that_is_not_finite_spoils_the_scores_as_in_a_product(side: str, bad: float) -> None:
    users, items = torch.ones(3, SINGLE_DIMENSIONS), torch.eye(SINGLE_DIMENSIONS)
    {"users": users, "items": items}[side][1, 5] = bad
    found = Factors(users, items).catalogue_scores(np.arange(3))
    np.testing.assert_array_equal(found, users @ items.T)
    assert not found.isfinite().all()
