"""Made vectors of items and queries, and indexes of them."""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.lib.machine import timed
from twotower.arrays.types import Vectors
from twotower.index import Index, build_index, measure_recall, tune_index
from twotower.index.protocol import IndexConfig
from twotower.index.vector_store import Similarity


@dataclass(frozen=True)
class Clusters:
    """Vectors of unit length: centres, drawn once, with `noise` deviations of every number."""

    centres: int
    width: int
    noise: float

    def points(self, n: int, seed: int) -> Vectors:
        centres = np.random.default_rng(0).standard_normal((self.centres, self.width), dtype=np.float32)
        rng = np.random.default_rng(seed)
        made = centres[rng.integers(0, self.centres, n)]
        made += np.float32(self.noise) * rng.standard_normal((n, self.width), dtype=np.float32)
        made /= np.linalg.norm(made, axis=1, keepdims=True)
        return made


class Tuned(NamedTuple):
    """An index, the seconds to build and to tune it, and its recall."""

    made: Index
    built: float
    tuned: float
    recall: float


def tuned(
    kind: str | IndexConfig, items: Vectors, queries: Vectors, metric: Similarity, k: int, target: float,
    threads: int = 0,
    save: Path | None = None,
) -> Tuned:  # fmt: skip
    """Build an index, save it to `save`, tune it to a recall on half of the queries, and measure it on the other
    half."""
    made, half = [], len(queries) // 2
    built = timed(lambda: made.append(build_index(kind, items, np.arange(len(items)), metric)))
    built += timed(lambda: made[0].save(save)) if save else 0.0
    made[0].threads = threads or made[0].threads
    spent = timed(lambda: tune_index(made[0], queries[:half], k, target))
    return Tuned(made[0], built, spent, measure_recall(made[0], queries[half:], k))


def search_times(index: Index, queries: Vectors, k: int) -> list[float]:
    """Return the milliseconds of a search for each query alone, on one thread."""
    index.threads = 1
    return [1e3 * timed(lambda one=one: index.search(one[None], k)) for one in queries]  # type: ignore[misc]
