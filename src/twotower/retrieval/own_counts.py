"""Own counts of a bundle: what the history of a request adds to the scores of its items."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from twotower.arrays.ragged import Ragged
from twotower.arrays.types import Codes, Floats, Ints, Shaped
from twotower.data.dataset import Dataset
from twotower.data.own_items import OwnItems, Recency, own_items, rows_of_codes
from twotower.errors import RunError


@dataclass(frozen=True)
class OwnCountWeights:
    """Weights of the items of a history of the users."""

    history: str
    """Name of the feature."""
    stored: Ragged
    """Codes of each user row."""
    rows: Shaped[Ints, "codes"]
    """Item row of each code, -1 for none."""
    weights: Shaped[Floats, "codes"]
    recency: Recency
    n_items: int

    @classmethod
    def of(cls, dataset: Dataset, stored: Ragged, history: str, weights: Floats, recency: Recency) -> OwnCountWeights:
        """Take the weights of the codes of a history. Raises RunError if they are not those of its codes."""
        spec = next((h for h in dataset.schema.histories("user") if h.name == history), None)
        field = next((f for f in dataset.encoders.fields("user") if f.name == history), None)
        if spec is None or field is None or spec.feature or spec.codes or len(weights) != field.rows:
            raise RunError(f"{len(weights):,} weights are not those of the codes of a history '{history}'")
        rows = rows_of_codes(dataset, spec, field.rows)
        return cls(history, stored, rows, weights, recency, len(dataset.items))

    def of_codes(self, codes: Codes) -> OwnItems:
        """Return the items of one history, the codes (n,), oldest first."""
        return self._of(Ragged(codes.astype(np.int32), np.array([0, len(codes)])))[0]

    def of_users(self, users: Ints) -> list[OwnItems]:
        """Return the items of the stored histories of some user rows."""
        return self._of(self.stored.take(users))

    def _of(self, histories: Ragged) -> list[OwnItems]:
        offsets, own = own_items(histories, self.rows, self.weights, self.recency, self.n_items)
        ends = offsets[1:-1]
        return [OwnItems(*part) for part in zip(np.split(own.rows, ends), np.split(own.scores, ends), strict=True)]
