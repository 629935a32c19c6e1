"""Weight of a pair beside others, the best on validation, with the bias of cold items that is best beside it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from twotower.arrays.types import F32, Bools, Shaped
from twotower.evaluation.factors import Factors
from twotower.train.starts.search import CLOSE, best_weight

RAISES = (0.0, 0.5, 1.0, 1.5, 2.0, 2.5)
"""Biases of cold items that are tried beside each weight, in standard deviations of a user's scores; all of them, as those that lift cold items into no
list are equally good."""
ENOUGH = 0.03
"""Share of the best score within which the least weight is taken beside cold items: what is gained beyond is lost to these on some seeds (docs/log.md)."""


@dataclass
class Blend:
    """Vectors of several pairs, one of which is weighed beside the others."""

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
    is_fitted: bool = False
    """True if the weight 1 is that of a fit, which others above 0 must be clearly better than."""
    beside: F32[Tensor, "rows"] | None = None
    """Addition to the bias of each item by the weight 1."""
    raised: dict[float, float] = field(default_factory=dict)
    """Bias of the cold items by the weights that were tried, the best one of each."""
    scores: dict[float, float] = field(default_factory=dict)
    """Score by the weights that were tried."""

    def metrics(self, weight: float) -> Mapping[str, float]:
        """Return the metrics by a weight, with the bias of the cold items that is best beside it, of RAISES."""
        items = self.factors.items.clone()
        items[:, self.part] = items[:, self.part] * self.unit * weight
        if self.beside is not None:
            items[:, -1] += weight * self.beside.to(items)
        found, biases = dict[float, Mapping[str, float]](), items[:, -1].clone()
        if self.cold is None or self.spread is None:
            found[0.0] = self.measure(replace(self.factors, items=items))
        else:
            cold, unit = torch.from_numpy(self.cold).to(items), self.spread(replace(self.factors, items=items))
            for raised in RAISES:
                items[:, -1] = biases + raised * unit * cold
                found[raised * unit] = self.measure(replace(self.factors, items=items))
        best = max(found, key=lambda bias: self.score_of(found[bias]))
        self.raised[weight], self.scores[weight] = best, self.score_of(found[best])
        return found[best]

    def best(self, given: Sequence[float], score: Callable[[float], float]) -> float:
        """Return the weight of the highest score, of those given and between them; if 1 is that of a fit, the one nearest to it within CLOSE of the highest. With cold items that the pair does not tell apart it is the least whose score is within ENOUGH of
        that: the greater the weight, the farther apart are known items, among which the scores of cold ones hardly differ."""
        if len(set(given)) == 1:
            return given[0]
        found = best_weight(given, score)
        if found and self.is_fitted:
            least = self.scores[found] - CLOSE * abs(self.scores[found])
            close = [weight for weight, value in self.scores.items() if weight and value >= least]
            return min(close, key=lambda weight: abs(math.log(weight)))
        if self.cold is None or self.tells_cold:
            return found
        enough = self.scores[found] - ENOUGH * abs(self.scores[found])
        return min(weight for weight, value in self.scores.items() if value >= enough)
