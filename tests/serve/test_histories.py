"""Recent events in this process: the bytes of users and items add up."""

from __future__ import annotations

from collections import Counter
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from twotower.serve.histories import _ITEM_BIT, _ITEM_OVERHEAD, Histories, TimedEvent, _unpack


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["put", "put", "put", "get", "keep", "drop", "take", "later"]),
            st.sampled_from(["a", "b", "ü" * 90, "\ud800"]),
            st.sampled_from([["1"], ["2"], ["1", "2"]]),
            st.lists(st.tuples(st.text(max_size=40), st.booleans(), st.booleans()), max_size=12),
        ),
        max_size=60,
    )
)
def test_fault_G6_the_sum_over_users_and_items_is_always_the_total(steps: list[Any]) -> None:
    now, one, all_of = 0.0, [0], Histories(8, 10.0, 1 << 30, clock=lambda: now)
    small = Histories(8, 10.0, 5_000, lambda what, n: one.append(n), clock=lambda: now)
    for what, user, bundles, events in steps:
        told = [TimedEvent(item, liked, now, known) for item, liked, known in events]
        now += 6.0 if what == "later" else 0.001
        for kept in (all_of, small):
            if what == "put":
                kept.put(user, bundles[-1], told)
            elif what == "get":
                assert all(e.time > now - 20 for e in kept.get(user, bundles))
            elif what == "keep":
                kept.save_vector(user, (bundles[-1], b"12345678", bytes(len(events))))
            elif what in ("drop", "take"):
                kept.drop(user, bundles if what == "take" else None)
            users, items = kept._users.values(), kept._items
            named = [c >> _ITEM_BIT for u in users for _, packed in u.histories.values() for _, c in _unpack(packed)]
            assert {n: uses for n, uses in enumerate(items._uses) if uses} == dict(Counter(named))
            weights = [u.size for u in users]
            for u in users:
                u.update_size()
            assert weights == [u.size for u in users]
            assert kept.size == sum(weights) + sum(_ITEM_OVERHEAD + len(t) for t in items._texts if t is not None)
        assert small.size <= 5_000
    for kept in (all_of, small):
        for user in ("a", "b", "ü" * 90, "\ud800"):
            kept.drop(user)
        assert kept.size == 0
        assert not len(kept)
