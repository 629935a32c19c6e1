"""Scores of own items, added to products of vectors, against a dense matrix."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from twotower.data.pairs import Pairs
from twotower.evaluation.added_scores import SparseScores
from twotower.evaluation.factors import Factors

N_USERS, N_ITEMS = 7, 9
RNG = np.random.default_rng(0)
DENSE = (RNG.random((N_USERS, N_ITEMS)) * (RNG.random((N_USERS, N_ITEMS)) < 0.3)).astype(np.float32)
DENSE[3] = 0


def own() -> SparseScores:
    users, items = np.nonzero(DENSE)
    offsets = np.r_[0, np.cumsum(np.bincount(users, minlength=N_USERS))]
    return SparseScores(offsets, items, DENSE[users, items], N_ITEMS)


def factors() -> Factors:
    vectors = np.random.default_rng(1).standard_normal((N_USERS + N_ITEMS, 4)).astype(np.float32)
    return Factors(torch.from_numpy(vectors[:N_USERS]), torch.from_numpy(vectors[N_USERS:]), added=(own(),))


def test_scores_of_the_catalogue_and_of_pairs_are_the_products_and_the_own_ones() -> None:
    found, users = factors(), np.array([5, 3, 0, 5])
    dense = (found.users @ found.items.T).numpy() + DENSE
    np.testing.assert_allclose(found.catalogue_scores(users).numpy(), dense[users], rtol=1e-5)
    user, item = (a.astype(np.int32) for a in np.divmod(np.arange(N_USERS * N_ITEMS), N_ITEMS))
    pairs = Pairs(user, item, np.ones(len(user), bool))
    np.testing.assert_allclose(found.scores(pairs), dense[user, item], rtol=1e-5)
    assert replace(found, added=()).scores(pairs)[DENSE.ravel() > 0].tolist() != dense[DENSE > 0].tolist()


def test_some_rows_keep_their_scores() -> None:
    users, items = np.array([6, 0, 3]), np.array([8, 1, 2, 5])
    some = factors().take(users, items)
    dense = (factors().users @ factors().items.T).numpy() + DENSE
    np.testing.assert_allclose(some.catalogue_scores(np.arange(3)).numpy(), dense[np.ix_(users, items)], rtol=1e-5)
    np.testing.assert_allclose(factors().take(users).catalogue_scores(np.arange(3)), dense[users], rtol=1e-5)


def test_those_of_a_user_are_its_row() -> None:
    for user in range(N_USERS):
        mine = own().of_user(user)
        assert mine.rows.tolist() == np.flatnonzero(DENSE[user]).tolist()
        assert mine.scores.tolist() == DENSE[user][mine.rows].tolist()
