"""Search for the values of a closed form that are best on validation."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from itertools import product

from twotower.scorers.start import Start

MAX_ROUNDS = 8
"""Steps beyond the values that are given."""
FINER = 0.5, 0.25
"""Lengths of the last steps, in the exponent of the ratio of neighbouring values."""


def search(start: Start, score: Callable[[Start], float]) -> Start:
    """Return the closed form by the values of the highest score: of all that are given; while it gets better, of values
    a step from the best, one option at a time, in the ratio of those given; at last of values a half and then a quarter
    of a step from it, of several options at once, as they may make up for one another.

    A score is minus infinity for values that cannot be solved; if all given are so, one of them is returned."""
    scores = dict[str, float]()
    best, highest = start.alternatives()[0], -math.inf
    given = [sorted(set(getattr(start, name))) for name in start.choices]
    ratios = [(values[-1] / values[0]) ** (1 / max(1, len(values) - 1)) for values in given]

    def improves(tried: Iterable[Start]) -> bool:
        """Try closed forms, and return True if one of them is the best."""
        nonlocal best, highest
        before = highest
        for one in tried:
            if one.describe() not in scores:
                scores[one.describe()] = found = score(one)
                if found > highest:
                    best, highest = one, found
        return highest > before

    def around(step: float, at_once: int) -> list[Start]:
        """Return the neighbours of the best a step away, in so many options at once."""
        signs = (s for s in product((-1, 0, 1), repeat=len(ratios)) if sum(map(abs, s)) <= at_once)
        moved = [[r ** (step * sign) for r, sign in zip(ratios, each, strict=True)] for each in signs]
        return [best.with_values(tuple(v * f for v, f in zip(best.values, each, strict=True))) for each in moved]

    if improves(start.alternatives()):
        for _ in range(MAX_ROUNDS):
            if not improves(around(1.0, 1)):
                break
        for step in FINER:
            if not improves(around(step, len(ratios))):
                break
    return best
