"""Works in turns, and the interval of the ratios of pairs."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from benchmarks.lib.rounds import in_turns, interval


def test_works_take_turns_and_one_that_may_fail_lacks_its_rounds(capsys: pytest.CaptureFixture[str]) -> None:
    called: list[str] = []

    def work(name: str) -> Callable[[], int]:
        def once() -> int:
            called.append(name)
            if name == "peer":
                raise OSError("no such tool")
            return len(called)

        return once

    works = {name: work(name) for name in ("ours", "peer")}
    assert in_turns(works, 2, optional=["peer"], reverse=True) == {"ours": [1, 4], "peer": []}
    assert called == ["ours", "peer", "peer", "ours"]
    assert "peer failed: ['no such tool']" in capsys.readouterr().err
    with pytest.raises(OSError, match="no such tool"):
        in_turns(works, 1)


def test_the_interval_of_ratios_is_that_of_their_logarithms() -> None:
    middle, low, high = interval([0.5, 2.0])
    assert middle == pytest.approx(1)
    assert low == pytest.approx(1 / high)
    assert math.log(high) == pytest.approx(12.71 * math.log(2), rel=1e-3)
    assert interval([3.0])[1:] == (0.0, math.inf)
