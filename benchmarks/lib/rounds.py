"""Measurements of several works in turns, so that other load of the machine slows all of them, and their comparison."""

import math
import statistics
import sys
from collections.abc import Callable, Collection, Mapping
from typing import TypeVar

T = TypeVar("T")
STUDENT = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14, 2.13)
"""Two-sided 95 % quantiles of Student's t, from 1 degree of freedom."""


def in_turns(
    works: Mapping[str, Callable[[], T]], rounds: int, optional: Collection[str] = (), reverse: bool = False
) -> dict[str, list[T]]:
    """Call every work once a round, in reverse order in every second round if `reverse`. Returns results by name.

    An optional work that raises an exception lacks its result of that round; a line is printed.
    """
    found: dict[str, list[T]] = {name: [] for name in works}
    for number in range(rounds):
        for name in list(works)[:: -1 if reverse and number % 2 else 1]:
            try:
                found[name].append(works[name]())
            except Exception as e:  # a peer that fails must not take the others' numbers along
                if name not in optional:
                    raise
                print(f"{name} failed: {str(e).strip().splitlines()[-1:]}", file=sys.stderr)
    return found


def interval(ratios: list[float]) -> tuple[float, float, float]:
    """Return the geometric mean of the ratios of pairs and the bounds of its 95 % interval."""
    logs = [math.log(r) for r in ratios]
    mean = statistics.fmean(logs)
    if len(logs) < 2:
        return math.exp(mean), 0.0, math.inf
    half = STUDENT[min(len(logs) - 2, len(STUDENT) - 1)] * statistics.stdev(logs) / math.sqrt(len(logs))
    return math.exp(mean), math.exp(mean - half), math.exp(mean + half)
