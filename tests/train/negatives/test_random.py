"""Random negatives are every unseen item, equally often."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from twotower.arrays.ragged import Ragged
from twotower.data.pairs import Pairs
from twotower.train.negatives.random import RandomNegatives


def pairs_of(rows: list[tuple[int, int, bool]]) -> Pairs:
    return Pairs(
        np.array([u for u, _, _ in rows], np.int32),
        np.array([i for _, i, _ in rows], np.int32),
        np.array([p for _, _, p in rows], bool),
    )


def items_of(rows: list[tuple[int, int, bool]], n_users: int) -> Ragged:
    """The items of each user, rising."""
    rows = sorted({(u, i, True) for u, i, _ in rows})
    met = pairs_of(rows)
    return Ragged.from_pairs(met.user, met.item, n_users)


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


@settings(deadline=None, max_examples=60)
@given(WORLD)
def test_a_draw_is_an_item_the_user_has_not_met_and_every_such_item_is_drawn(
    world: tuple[int, list[tuple[int, int, bool]], int],
) -> None:
    n_items, rows, seed = world
    negatives = RandomNegatives(items_of(rows, 5), n_items)
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
    negatives = RandomNegatives(items_of(rows, 4), 20)
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
