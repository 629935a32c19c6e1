"""The circuit breaker in front of a server that fails (row F1 of the faults)."""

from __future__ import annotations

from twotower.serve.circuit_breaker import CircuitBreaker


def test_a_breaker_opens_after_three_lets_one_try_and_rests_longer_each_time() -> None:
    now = 0.0
    breaker = CircuitBreaker(failures=3, pause=1.0, max_pause=8.0, clock=lambda: now)
    for _ in range(3):
        began = breaker.begin()
        assert began is not None
        breaker.failed(began)
    assert breaker.begin() is None
    now += 1.3
    began = breaker.begin()
    assert began is not None
    assert breaker.begin() is None  # one at a time
    breaker.failed(began)
    now += 1.3
    assert breaker.begin() is None
    now += 1.3
    assert breaker.begin() is not None
    breaker.succeeded()
    assert breaker.closed
    for _ in range(40):
        now += 20
        began = breaker.begin()
        assert began is not None
        breaker.failed(began)
    assert breaker.begin() is None
    now += 8.0 * 1.25
    assert breaker.begin() is not None


def test_tries_that_fail_together_are_one_failure() -> None:
    now = 0.0
    breaker = CircuitBreaker(failures=3, pause=1.0, max_pause=8.0, clock=lambda: now)
    tries = [breaker.begin() for _ in range(16)]
    now += 0.02
    for began in tries:
        assert began is not None
        breaker.failed(began)
    assert breaker.begin() is None
    now += 1.3  # the first rest, not the fourteenth
    assert breaker.begin() is not None
