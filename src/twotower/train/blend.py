"""Weight of a pair beside others, the best on validation, with the bias of cold items that is best beside it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from twotower.arrays.types import Bools, Shaped
from twotower.evaluation.factors import Factors
from twotower.train.cold_items import climb
from twotower.train.starts.search import CLOSE, best_weight

LEAST = 1e-3
"""Weight that is taken for 0 where the ratio of two weights tells how near they are."""


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
    cold: Shaped[Bools, "items"] | None = None
    """True for items that a bias raises. None: no item."""
    step: float = 0.0
    """Step of that bias."""
    raised: dict[float, float] = field(default_factory=dict)
    """Bias of the cold items by the weights that were tried, the best one of each."""
    scores: dict[float, float] = field(default_factory=dict)
    """Score by the weights that were tried."""

    def metrics(self, weight: float) -> Mapping[str, float]:
        """Return the metrics by a weight, with the bias of the cold items that is best beside it: from that of the nearest weight on."""
        items, found = self.factors.items.clone(), dict[float, Mapping[str, float]]()
        items[:, self.part] = items[:, self.part] * self.unit * weight
        biases = items[:, -1].clone()
        cold = None if self.cold is None else torch.from_numpy(self.cold).to(items)

        def score(bias: float) -> float:
            if cold is not None:
                items[:, -1] = biases + bias * cold
            found[bias] = self.measure(Factors(self.factors.users, items))
            return self.score_of(found[bias])

        near = min(self.raised, key=lambda one: abs(math.log((one or LEAST) / (weight or LEAST))), default=None)
        bias = climb(score, 0.0 if near is None else self.raised[near], self.step if cold is not None else 0.0)
        self.raised[weight], self.scores[weight] = bias, self.score_of(found[bias])
        return found[bias]

    def best(self, given: Sequence[float], score: Callable[[float], float]) -> float:
        """Return the weight of the highest score, of those given and between them. With cold items it is the least whose score is within CLOSE of
        that: the greater the weight, the farther apart are known items, among which the scores of cold ones hardly differ."""
        if len(set(given)) == 1:
            return given[0]
        found = best_weight(given, score)
        if self.cold is None:
            return found
        enough = self.scores[found] - CLOSE * abs(self.scores[found])
        return min(weight for weight, value in self.scores.items() if value >= enough)
