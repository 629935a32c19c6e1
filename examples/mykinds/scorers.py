"""A scorer of one's own: items that many users took together with those of the history.

    scorers = [{ kind = "ials" }, { kind = "mykinds.scorers:Together", width = 64 }]

`solve` gives the vectors of a pair of towers: a row of `source` for each item in a history, which the pooling adds up,
and a row of `targets` for each item that is ranked. The mix finds the weight, and the export needs no code of its own.
"""

from __future__ import annotations

import torch
from pydantic import Field

from twotower.features.field import PoolingSpec
from twotower.model.pooling.pooling import Pooling
from twotower.scorers.positives import PositiveMatrix
from twotower.scorers.start import PairValues, Start


class Together(Start):
    """Cosines of items by their users, c_ij = n_ij / sqrt((n_i + s) (n_j + s)) with n_ij the users of both items and
    c_ii = 0, as a product of the directions that tell most (Sarwar et al. 2001, "Item-based Collaborative Filtering
    Recommendation Algorithms"). The score of a history is the sum over its items.

    Use it to see how a scorer is written; memory is the square of the number of items.
    """

    pools = PoolingSpec(kind="sum")

    shrinkage: float = Field(10.0, ge=0, description="Addition s to the users of an item.")

    def solve(self, positives: PositiveMatrix, pooling: Pooling, width: int, seed: int) -> PairValues:
        """Return the eigenvectors of the largest eigenvalues, those below 0 too."""
        n = positives.n_columns
        users = positives.transposed().product(positives.product(torch.eye(n)))
        root = (users.diagonal() + self.shrinkage).sqrt().clamp(min=1e-6)
        values, vectors = torch.linalg.eigh((users / torch.outer(root, root)).fill_diagonal_(0.0))
        most = values.abs().argsort(descending=True)[:width]
        source, targets = torch.zeros(n, width), torch.zeros(n, width)
        source[:, : len(most)], targets[:, : len(most)] = vectors[:, most] * values[most], vectors[:, most]
        return PairValues(source, (targets,))
