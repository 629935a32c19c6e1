"""Token buckets and slots of clients."""

from __future__ import annotations

import contextlib

import pytest
from clock import Clock
from hypothesis import given, settings
from hypothesis import strategies as st

from twotower.serve.client_limits import ClientSlots, RateLimiter
from twotower.serve.problems import Problem


def test_a_client_has_its_rate_and_its_burst() -> None:
    clock = Clock()
    limiter = RateLimiter(rate=2, burst=3, clients=2, clock=clock)
    for _ in range(3):
        limiter.take("a")
    limiter.take("b")
    with pytest.raises(Problem, match="more than 2 requests a second") as refused:
        limiter.take("a")
    assert (refused.value.status, refused.value.headers) == (429, {"Retry-After": "1"})
    clock.now += 0.5
    limiter.take("a")
    with pytest.raises(Problem):
        limiter.take("a")
    limiter.take("c")  # the third client; b is the one that was quiet longest
    assert len(limiter._buckets) == 2
    assert "b" not in limiter._buckets


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(0, 3), max_size=60), st.floats(0.1, 20), st.integers(1, 20))
def test_no_client_gets_more_than_its_burst_and_its_rate(gaps: list[float], rate: float, burst: int) -> None:
    clock = Clock()
    limiter = RateLimiter(rate, burst, clock=clock)
    let_in = 0
    for gap in gaps:
        clock.now += gap
        with contextlib.suppress(Problem):
            limiter.take("a")
            let_in += 1
    assert let_in <= burst + rate * sum(gaps) + 1e-6


def test_fault_G16_slots_beside_the_permits_are_not_all_one_clients() -> None:
    slots = ClientSlots(4, 2, "looks")
    with slots.hold("a"), slots.hold("a"):
        with pytest.raises(Problem, match="2 looks"), slots.hold("a"):
            pass
        with slots.hold("b"), slots.hold("c"), pytest.raises(Problem, match="4 looks"), slots.hold("d"):
            pass
        with slots.hold("d"):
            pass
    assert slots._taken == {}
