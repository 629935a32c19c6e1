"""Pairs by user, in any order and sorted, and counts of them."""

from __future__ import annotations

import numpy as np
import pytest

from twotower.data.pairs import GroupedPairs, Pairs, counts


def some_pairs(seed: int = 0) -> Pairs:
    rng = np.random.default_rng(seed)
    return Pairs(
        rng.integers(0, 9, 200).astype(np.int32), rng.integers(0, 30, 200).astype(np.int32), rng.random(200) < 0.5
    )


def rows(pairs: Pairs) -> list[tuple[int, int, bool]]:
    return list(zip(pairs.user.tolist(), pairs.item.tolist(), pairs.positive.tolist(), strict=True))


@pytest.mark.parametrize("users", [[3], [0, 8], [8, 2, 5], [9], []])
def test_the_pairs_of_some_users_are_theirs_in_the_order_of_the_table(users: list[int]) -> None:
    pairs = some_pairs()
    expected = [(users.index(u), i, p) for user in users for u, i, p in rows(pairs) if u == user]
    by_user = pairs.take(np.argsort(pairs.user, kind="stable"))
    wanted = np.array(users, np.int64)
    for grouped in (GroupedPairs.of(pairs, 10), GroupedPairs.of_sorted(by_user, 10)):
        assert rows(grouped.take(wanted)) == expected
        assert grouped.lengths.tolist() == np.bincount(pairs.user, minlength=10).tolist()


def test_renumbered_pairs_by_user_are_the_renumbered_pairs() -> None:
    pairs = some_pairs()
    users, items = np.array([4, 1, 7]), np.arange(30) // 2 - 3
    items[items < 0] = -1
    places = np.full(10, -1)
    places[users] = np.arange(3)
    grouped = GroupedPairs.of(pairs, 10).renumbered(users, items)
    whole = pairs.renumbered(places, items)
    assert sorted(rows(grouped.take(np.arange(3)))) == sorted(rows(whole))
    assert rows(whole) == [
        (int(places[u]), int(items[i]), p) for u, i, p in rows(pairs) if places[u] >= 0 and items[i] >= 0
    ]


def test_counts_in_a_mask_of_few_and_of_many_values() -> None:
    pairs = some_pairs()
    for n in (30, 2**20):
        found = counts(pairs.item, n, pairs.positive)
        assert found.tolist() == np.bincount(pairs.item[pairs.positive], minlength=n).tolist()
