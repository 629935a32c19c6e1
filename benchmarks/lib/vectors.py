"""Made vectors of items and queries."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from twotower.arrays.types import Vectors


@dataclass(frozen=True)
class Clusters:
    """Vectors of unit length: centres, drawn once, with `noise` deviations of every number."""

    centres: int
    width: int
    noise: float

    def points(self, n: int, seed: int) -> Vectors:
        """Draw (n, width) vectors."""
        centres = np.random.default_rng(0).standard_normal((self.centres, self.width), dtype=np.float32)
        rng = np.random.default_rng(seed)
        made = centres[rng.integers(0, self.centres, n)]
        made += np.float32(self.noise) * rng.standard_normal((n, self.width), dtype=np.float32)
        made /= np.linalg.norm(made, axis=1, keepdims=True)
        return made
