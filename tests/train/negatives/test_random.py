"""Random negatives are every unseen item, equally often."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from candidate_worlds import ROW, batch_of, own_items, positives, world
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from twotower.arrays.ragged import Ragged
from twotower.data.dataset import Dataset
from twotower.train.contrastive import contrastive_loss
from twotower.train.losses.bpr import Bpr
from twotower.train.losses.gbce import Gbce
from twotower.train.losses.loss import ContrastiveLoss
from twotower.train.losses.softmax import Softmax
from twotower.train.negatives.config import NegativesConfig
from twotower.train.negatives.mixture import CandidateSampler
from twotower.train.negatives.random import UnseenItems


def items_of(rows: list[tuple[int, int, bool]], n_users: int) -> Ragged:
    """The items of each user, ascending."""
    distinct = sorted({(u, i) for u, i, _ in rows})
    user, item = (np.array([row[at] for row in distinct], np.int32) for at in range(2))
    return Ragged.from_pairs(user, item, n_users)


WORLD = st.integers(1, 9).flatmap(
    lambda n_items: st.tuples(
        st.just(n_items),
        st.lists(
            st.tuples(st.integers(0, 4), st.integers(0, n_items - 1), st.booleans()),
            max_size=40,
            unique_by=lambda row: row[:2],
        ),
        st.integers(0, 2**31),
    )
)


@settings(deadline=None, max_examples=30)
@given(WORLD)
def test_a_draw_is_an_item_the_user_has_not_met_and_every_such_item_is_drawn(
    world: tuple[int, list[tuple[int, int, bool]], int],
) -> None:
    n_items, rows, seed = world
    negatives = UnseenItems(items_of(rows, 5), n_items)
    allowed = {u: set(range(n_items)) - {i for v, i, _ in rows if v == u} for u in range(5)}
    assert negatives.unseen_counts.tolist() == [len(allowed[u]) for u in range(5)]
    users = np.repeat([u for u in range(5) if allowed[u]], 300).astype(np.int64)
    drawn = negatives.draw(users, np.random.default_rng(seed))
    for u in np.unique(users).tolist():
        # An item is missed by 300 draws out of at most 9 with probability below 1e-15.
        assert set(drawn[users == u].tolist()) == allowed[u]


def test_draws_are_uniform_over_the_items_not_met() -> None:
    met = {0: [0, 1, 2, 17], 1: [19], 2: [], 3: [1, 3, 5, 7, 9, 11, 13, 15, 17, 19]}
    rows = [(u, i, i % 2 == 0) for u, items in met.items() for i in items]
    negatives = UnseenItems(items_of(rows, 4), 20)
    n = 20_000
    users = np.repeat(np.arange(4), n)
    drawn = negatives.draw(users, np.random.default_rng(3))
    for u in range(4):
        count = np.bincount(drawn[users == u], minlength=20)
        free = np.setdiff1d(np.arange(20), met[u])
        assert count[met[u]].sum() == 0
        expected = n / len(free)
        chi_square = ((count[free] - expected) ** 2 / expected).sum()
        freedom = len(free) - 1
        # Mean `freedom`, variance 2 x freedom; both tails, so that draws too even for chance fail as well.
        assert abs(chi_square - freedom) < 4 * np.sqrt(2 * freedom)


@settings(
    deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(rows=st.lists(ROW, min_size=1, max_size=60, unique_by=lambda row: row[:2]), n=st.integers(1, 31))
def test_random_candidates_are_distinct_items_the_user_has_not_met_as_many_as_there_are(
    board: Dataset, rows: list[tuple[int, int, bool]], n: int
) -> None:
    data = world(board, [*rows, (39, 3, True)])
    met: dict[int, set[int]] = {}
    for u, i, _ in rows:
        met.setdefault(u, set()).add(i)
    sampler = CandidateSampler(data, NegativesConfig(random=n, in_batch=False), seed=4)
    user, item = positives(data)
    c = sampler(batch_of(user, item), 0)
    for u, row in zip(user.tolist(), own_items(c), strict=True):
        free = set(range(30)) - met.get(u, {3})
        assert len(row) == len(set(row)) == min(n, len(free))
        assert set(row) <= free


def test_random_candidates_are_uniform_over_the_steps(board: Dataset) -> None:
    data = world(board, [(0, i, i % 2 == 0) for i in range(0, 30, 3)] + [(1, 0, True)])
    sampler = CandidateSampler(data, NegativesConfig(random=4, in_batch=False), seed=4)
    user, item = np.array([0, 1], np.int32), np.array([0, 0], np.int32)
    counts, steps = np.zeros((2, 30)), 1000
    for step in range(steps):
        for row, found in enumerate(own_items(sampler(batch_of(user, item), step))):
            counts[row, found] += 1
    for row, free in ((0, [i for i in range(30) if i % 3]), (1, list(range(1, 30)))):
        expected = steps * 4 / len(free)
        assert np.abs(counts[row, free] - expected).max() < 5 * np.sqrt(expected)
        assert counts[row].sum() == steps * 4


@pytest.mark.parametrize("loss", [Softmax(), Gbce(calibration=0), Bpr()], ids=repr)
def test_with_random_candidates_alone_a_row_is_its_positive_against_them_and_nothing_else(
    everything_data: Dataset, loss: ContrastiveLoss
) -> None:
    """The softmax of the 2013 DSSM: one clicked and some random ones, by a loop; nothing to correct."""
    data, config = everything_data, NegativesConfig(random=4, in_batch=False)
    user, item = positives(data, 50)
    c = CandidateSampler(data, config, seed=1)(batch_of(user, item), 3)
    assert not c.log_q.any()
    assert not c.counts.any()
    rng = torch.Generator().manual_seed(0)
    u, everything = torch.randn(60, 5, generator=rng), torch.randn(40, 5, generator=rng)
    found = contrastive_loss(u[user.astype(int)], everything[c.items], c, loss, 40)
    expected = 0.0
    for who, what, others in zip(user.tolist(), item.tolist(), own_items(c), strict=True):
        chosen, scores = float(u[who] @ everything[what]), [float(u[who] @ everything[o]) for o in others]
        if loss.kind == "softmax":
            expected += math.log(sum(math.exp(s) for s in (chosen, *scores))) - chosen
        elif loss.kind == "bpr":
            expected += sum(math.log1p(math.exp(s - chosen)) for s in scores) / len(scores)
        else:
            pairs = math.log1p(math.exp(-chosen)) + sum(math.log1p(math.exp(s)) for s in scores)
            expected += pairs / (1 + len(scores))
    assert float(found) == pytest.approx(expected / len(user), rel=1e-5)
