"""Search for the values of a start that are best on validation: among those given, beyond them, and between them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from itertools import chain
from operator import itemgetter

import numpy as np

from twotower.data.pairs import Pairs
from twotower.evaluation.config import EvaluationConfig
from twotower.evaluation.metrics.metric import PairMetric
from twotower.scorers.start import Start

MAX_BEYOND = 8
"""Rounds of values that are not given. A round tries one value further of every option whose outermost is the best."""
CLOSE = 0.01
"""Share of the best score within which another one is as good, as far as a validation part can tell."""
MAX_SCORES = 2_000_000_000
"""Scores of users and items of one comparison, some 15 seconds of a processor core for vectors of 128 numbers."""
MIN_USERS = 1000
"""Users of a comparison at least, whatever the scores."""


def evaluation_of_search(config: EvaluationConfig, n_items: int) -> EvaluationConfig:
    """Return how values are compared: as in a training, with no more users, drawn once, than MAX_SCORES have for all
    items."""
    fits = max(MIN_USERS, MAX_SCORES // n_items)
    return config.model_copy(update={"max_users": min(config.max_users or fits, fits)})


def users_told(config: EvaluationConfig, monitor: str, validation: Pairs) -> str:
    """Return what a line about a value says of the users who compare it: nothing if they are all of validation, as for
    a metric of pairs."""
    if isinstance(config.metric_set.find(monitor), PairMetric):
        return ""
    users = len(np.unique(validation.user[validation.target]))
    return f" by {config.max_users:,} of {users:,} users of validation" if config.max_users < users else ""


def search(start: Start, score: Callable[[Start], float]) -> Start:
    """Return the start with the values of the highest score: of those given; while an outermost one of several is the
    best, of values beyond it; then of values between the best and its neighbours; at last of values between these,
    and about another one that is as good. Options that make up for one another have such a second one,
    from which the way to the best is shorter.

    A score is minus infinity for values that cannot be solved; if all given are so, one of them is returned.
    """
    tried = list[tuple[float, Start]]()

    def improves(found: Iterable[Start]) -> bool:
        """Try starts, and return True if one of them is the best."""
        before = max(tried, key=itemgetter(0), default=(-math.inf, start))[0]
        known = {one.describe() for _, one in tried}
        tried.extend(
            (score(one), one) for one in {s.describe(): s for s in found}.values() if one.describe() not in known
        )
        return max(tried, key=itemgetter(0))[0] > before

    def about(leader: Start) -> list[Start]:
        return start.between(leader, [one for _, one in tried])

    if improves(start.alternatives()):
        for _ in range(MAX_BEYOND):
            if not improves(start.beyond(_leaders(tried)[0])):
                break
        if improves(about(_leaders(tried)[0])):
            improves(chain.from_iterable([about(leader) for leader in _leaders(tried)]))
    return _leaders(tried)[0]


def _leaders(tried: list[tuple[float, Start]]) -> list[Start]:
    """Return the start of the highest score, and the next if it is as good."""
    (best, first), *others = sorted(tried, key=itemgetter(0), reverse=True)
    return [first, *(one for score, one in others[:1] if best - score <= CLOSE * abs(best))]
