"""The map of the console: item vectors, projected to their first two principal components."""

from __future__ import annotations

import numpy as np
import polars as pl

from twotower.arrays.types import Doubles, Floats, Ints
from twotower.features.feature import Feature
from twotower.features.values import canonical_ids
from twotower.retrieval.retriever import Retriever
from twotower.serve.problems import Problem

MAP_GROUPS = 20
"""Groups of items on the map that have a name; other items have group -1."""
REMOTE_MAP_ITEMS = 20_000
"""Number of most popular items whose vectors are fetched from a remote index."""
SAMPLED_VECTORS = 50_000
"""Number of vectors for the principal components."""


class ItemMap:
    """Points of the items of a bundle, and of vectors of its users. 99.5 % of the coordinates are within -1 to 1."""

    def __init__(self, retriever: Retriever) -> None:
        """Project the items; of a remote index only the most popular ones. Raises Unavailable."""
        self._rows = retriever.index.rows
        if retriever.index.remote:
            popular = retriever.popularity.rows
            self._rows = np.sort(popular[np.isin(popular, self._rows)][:REMOTE_MAP_ITEMS])
        self._vectors = retriever.neighbours.unit_vectors(self._rows)
        sample = self._vectors[:: max(1, len(self._vectors) // SAMPLED_VECTORS)]
        self._mean: Floats = sample.mean(axis=0)
        width = len(self._mean)
        _, directions = np.linalg.eigh(np.cov((sample - self._mean).T.astype(np.float64), bias=True).reshape(width, -1))
        self._plane = np.zeros((width, 2), np.float32)
        best = directions[:, ::-1][:, :2].astype(np.float32)
        self._plane[:, : best.shape[1]] = best * np.where(best.sum(axis=0) < 0, -1, 1)  # a fixed sign
        far = float(np.quantile(np.abs((sample - self._mean) @ self._plane), 0.995)) if len(sample) else 0.0
        self._scale = 1 / far if far > 0 else 1.0

    def of(self, rows: Ints) -> Ints:
        """Return those item rows that have a point."""
        return rows[np.isin(rows, self._rows)]

    def points(self, rows: Ints) -> Doubles:
        """Return the points (n, 2) of item rows (n,)."""
        return self._project(self._vectors[np.searchsorted(self._rows, rows)])

    def point_of_user(self, vector: Floats) -> Doubles:
        """Return the point (2,) of the direction of a user vector (1, D)."""
        vector = vector[:, : len(self._mean)]
        point: Doubles = self._project(vector / max(float(np.linalg.norm(vector)), 1e-12))[0]
        return point

    def _project(self, vectors: Floats) -> Doubles:
        return rounded((vectors - self._mean) @ self._plane * self._scale)


def colour_columns(retriever: Retriever) -> dict[str, Feature]:
    """Return the columns of the items that can colour the map, by name."""
    features = [f for f in retriever.schema.side("item") if f.groups]
    return {
        f.source: f for f in features if f.source in retriever.item_columns and f.source != retriever.schema.item_id
    }


def colour_feature(retriever: Retriever, column: str) -> Feature | None:
    """Return the feature of a column, by default of the first one; None if the items have none. Raises Problem."""
    columns = colour_columns(retriever)
    if column and column not in columns:
        raise Problem("invalid", f"items cannot be coloured by '{column}' (allowed: {', '.join(columns) or 'none'})")
    return columns[column] if column else next(iter(columns.values()), None)


def colour_groups(retriever: Retriever, feature: Feature | None, rows: Ints) -> tuple[list[str], list[int]]:
    """Return the names of the largest groups, and the group of each row; several values: the first group."""
    if feature is None:
        return [], [-1] * len(rows)
    series = retriever.dataset.items.frame[feature.source].gather(rows)
    series = feature.values(series)
    if isinstance(series.dtype, pl.List):
        series = series.list.first()
    values = canonical_ids(series).cast(pl.String).fill_null("").alias("value")  # spelled as in `where`
    counts = (
        values.value_counts(sort=True).filter(pl.col("value") != "").sort("count", "value", descending=[True, False])
    )
    names = counts["value"].head(MAP_GROUPS).to_list()
    number = {name: place for place, name in enumerate(names)}
    return names, [number.get(value, -1) for value in values.to_list()]


def rounded(values: Floats | Doubles) -> Doubles:
    """Return numbers with four decimals."""
    return values.astype(np.float64).round(4)
