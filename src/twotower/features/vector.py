"""Feature `vector`: a precomputed vector."""

from __future__ import annotations

import numpy as np
import polars as pl
from pydantic import Field

from twotower.arrays.types import Floats, Ints
from twotower.errors import DataError
from twotower.features.encoder import Count, StateEncoder
from twotower.features.feature import ColumnFeature
from twotower.features.field import InputField


class VectorEncoder(StateEncoder):
    """Encoder of vectors as floats (n, length), divided by `scale`. Missing and non-finite values are zeros."""

    length: Count
    scale: float

    def transform(self, series: pl.Series) -> Floats:
        lists = _as_lists(series)
        lengths = lists.list.len().to_numpy().astype(float)
        wrong = np.flatnonzero(~np.isnan(lengths) & (lengths != self.length))
        if len(wrong):
            raise DataError(
                f"column '{series.name}': {len(wrong)} vectors of unequal length, the first in row {wrong[0]} with "
                f"{int(lengths[wrong[0]])} numbers, expected {self.length}; pad or drop them"
            )
        out = np.zeros((len(series), self.length), np.float32)
        present = ~np.isnan(lengths)
        flat = lists.drop_nulls().explode().cast(pl.Float32).fill_null(0.0).to_numpy()
        out[present] = flat.reshape(-1, self.length)
        out[~np.isfinite(out)] = 0.0
        return out / np.float32(self.scale)

    def field(self, name: str, width: int) -> InputField:
        return InputField(name, "dense", length=self.length, width=width)


class Vector(ColumnFeature):
    """A precomputed vector, such as an embedding of a text or an image, projected to the field's width.

    Use it where another model describes users or items, as for new items. All vectors have one length. They are divided
    by the root mean square of the numbers of the training vectors; a missing vector is zeros.
    """

    kind = "vector"
    encoder = VectorEncoder
    column_type = "numbers"

    length: int = Field(0, ge=0, description="Length of the vectors. 0: the length in the data.")

    def fit(self, series: pl.Series, counts: Ints) -> VectorEncoder:
        length = self.length or int(_as_lists(series).list.len().drop_nulls().max() or 0)  # type: ignore[arg-type]
        if not length:
            raise DataError(f"column '{series.name}': every vector is missing or empty; drop the feature")
        numbers = VectorEncoder(length=length, scale=1.0).transform(series)[counts > 0]
        present = numbers[(numbers != 0).any(1)].astype(np.float64)
        scale = float(np.sqrt((present**2).mean())) if len(present) else 1.0
        return VectorEncoder(length=length, scale=scale)


def _as_lists(series: pl.Series) -> pl.Series:
    if isinstance(series.dtype, pl.Array):
        series = series.arr.to_list()
    if series.dtype in (pl.Null, pl.List(pl.Null)):
        series = series.cast(pl.List(pl.Float64))
    if not (isinstance(series.dtype, pl.List) and series.dtype.inner.is_numeric()):
        raise DataError(
            f"column '{series.name}': found {series.dtype}, expected lists of numbers; "
            "convert it, or choose another kind of feature"
        )
    return series
