"""Weight of a pair added to others, the best on validation, with the bias of cold items that is best for it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from twotower.arrays.types import F32, Bools, Shaped
from twotower.evaluation.factors import Factors
from twotower.train.cold_items import best_bias
from twotower.train.starts.search import best_weight

RAISE = 2.5
"""Highest of the biases of cold items that are tried first with each weight, from 0, in standard deviations of a
user's scores; all of them, as those that lift cold items into no list are equally good, and then finer ones around the
best, as a weight looks worse by a bias that is not its own."""
ENOUGH = 0.03
"""Share of the best score within which the least weight is taken with cold items: what is gained beyond is lost to
these on some seeds (docs/log.md)."""


@dataclass
class Blend:
    """Vectors of several pairs, one of which is added to the others by a weight."""

    factors: Factors
    part: slice
    """Columns of the pair that is weighed."""
    unit: float
    """Factor of its item vectors by the weight 1."""
    measure: Callable[[Factors], Mapping[str, float]]
    """Metrics of vectors on validation."""
    score_of: Callable[[Mapping[str, float]], float]
    """The monitored one of metrics; higher is better."""
    cold: Shaped[Bools, "rows"] | None = None
    """True for rows of items that a bias raises. None: no item."""
    spread: Callable[[Factors], float] | None = None
    """Standard deviation of a user's scores, the unit of that bias."""
    tells_cold: bool = False
    """True if the pair tells cold items apart too, so that its weight spreads these and the known ones alike."""
    tolerance: Callable[[Factors], Callable[[Factors], float]] | None = None
    """By the best vectors, how far below them the score of others may be by chance, if the weight 1 is that of a fit,
    which others above 0 must be clearly better than. None: the weight 1 is as any other."""
    beside: F32[Tensor, "rows"] | None = None
    """Addition to the bias of each item by the weight 1."""
    raised: dict[float, float] = field(default_factory=dict)
    """Bias of the cold items by the weights that were tried, the best one of each."""
    scores: dict[float, float] = field(default_factory=dict)
    """Score by the weights that were tried."""

    def metrics(self, weight: float) -> Mapping[str, float]:
        """Return the metrics by a weight, with the bias of the cold items that is best for it."""
        found = dict[float, Mapping[str, float]]()

        def score(bias: float) -> float:
            found[bias] = self.measure(self._weighed(weight, bias))
            return self.score_of(found[bias])

        best = 0.0
        spread = self.spread(self._weighed(weight)) if self.cold is not None and self.spread else 0.0
        if spread > 0:
            best = best_bias(score, spread, lowest=0.0, highest=RAISE, beyond=0)
        else:
            score(best)
        self.raised[weight], self.scores[weight] = best, self.score_of(found[best])
        return found[best]

    def _weighed(self, weight: float, bias: float = 0.0) -> Factors:
        """Return the vectors by a weight, with a bias of the cold items."""
        items = self.factors.items.clone()
        items[:, self.part] = items[:, self.part] * self.unit * weight
        if self.beside is not None:
            items[:, -1] += weight * self.beside.to(items)
        if self.cold is not None:
            items[:, -1] += bias * torch.from_numpy(self.cold).to(items)
        return replace(self.factors, items=items)

    def best(self, given: Sequence[float], score: Callable[[float], float]) -> float:
        """Return the weight of the highest score, of those given and between them; if 1 is that of a fit, the one
        nearest to it that is no worse but for chance. With cold items that the pair does not tell apart it is the least
        whose score is within ENOUGH of that: the greater the weight, the farther apart are known items, among which the
        scores of cold ones hardly differ."""
        if len(set(given)) == 1:
            return given[0]
        found = best_weight(given, score)
        if found and self.tolerance:
            allowed = self.tolerance(self._weighed(found, self.raised[found]))
            nearest = sorted((weight for weight in self.scores if weight), key=lambda weight: abs(math.log(weight)))
            less = {weight: self.scores[found] - self.scores[weight] for weight in nearest}
            return next(w for w in nearest if less[w] <= 0 or less[w] <= allowed(self._weighed(w, self.raised[w])))
        if self.cold is None or self.tells_cold:
            return found
        enough = self.scores[found] - ENOUGH * abs(self.scores[found])
        return min(weight for weight, value in self.scores.items() if value >= enough)
