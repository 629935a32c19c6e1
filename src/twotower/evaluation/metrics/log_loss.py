"""Metric `log_loss`: the calibration of logits."""

from __future__ import annotations

import numpy as np

from twotower.arrays.pieces import mean_of
from twotower.arrays.types import Doubles, Shaped
from twotower.evaluation.metrics.measured import ScoredPairs
from twotower.evaluation.metrics.metric import PairMetric, Prominence


class LogLoss(PairMetric):
    """Mean of -log p(label) over the pairs, p = sigmoid(logit). Comparable between models whose scores are logits of
    liking, as those of loss.kind = "bce" without random negatives.

    Use it where the score is read as a probability.
    """

    kind = "log_loss"
    prominence = Prominence.FILE
    higher_is_better = False
    of_logits = True

    def value(self, pairs: ScoredPairs) -> float:
        """Return the mean, weighted if the pairs have weights; NaN without pairs."""

        def losses(part: slice) -> Shaped[Doubles, "_"]:
            scores = pairs.scores[part]
            x = np.where(pairs.positive[part], -scores, scores).astype(np.float64)
            loss: Doubles = np.logaddexp(0.0, x) * pairs.weights[part]
            return loss

        n = len(pairs.scores)
        return mean_of(n, losses) / mean_of(n, lambda part: pairs.weights[part].astype(np.float64))
