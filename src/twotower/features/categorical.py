"""Feature `categorical`: values of a vocabulary, or hash buckets."""

from __future__ import annotations

import hashlib
from bisect import bisect_left

import numpy as np
import polars as pl
from pydantic import Field, JsonValue

from twotower.arrays.types import Codes, Ints
from twotower.features.encoder import Count, Encoder, EncoderState
from twotower.features.feature import ColumnFeature
from twotower.features.field import InputField
from twotower.features.values import UNKNOWN, canonical_ids


class CategoricalState(EncoderState):
    """State of a `CategoricalEncoder` without its vocabulary."""

    hash_buckets: Count


class CategoricalEncoder(Encoder):
    """Encoder of values as codes: 0 for unknown values, 1..n for the ascending vocabulary or the buckets."""

    def __init__(self, vocabulary: pl.Series, hash_buckets: int = 0) -> None:
        self.vocabulary = vocabulary
        self.hash_buckets = hash_buckets
        self._codes = pl.DataFrame({"value": vocabulary, "code": np.arange(1, len(vocabulary) + 1, dtype=np.int32)})
        self.has_binary_search = vocabulary.is_sorted() and not vocabulary.null_count()
        """True if `code` may be called: the vocabulary is sorted."""

    @classmethod
    def fit(
        cls, series: pl.Series, counts: Ints, min_count: int = 1, min_rate: float = 0.0, hash_buckets: int = 0,
        total: int | None = None,
    ) -> CategoricalEncoder:  # fmt: skip
        """Keep values of at least `min_count` and of a share of at least `min_rate` of `total`, the sum of `counts`."""
        values = canonical_ids(series)
        if hash_buckets:
            return cls(values.clear(), hash_buckets)
        total = max(1, int(counts.sum()) if total is None else total)
        kept = (
            pl.DataFrame({"value": values, "n": counts})
            .drop_nulls("value")
            .group_by("value")
            .agg(pl.col("n").sum())
            .filter(pl.col("n") >= min_count, pl.col("n") / total >= min_rate)
        )
        return cls(kept["value"].sort())

    @property
    def rows(self) -> int:
        return (self.hash_buckets or len(self.vocabulary)) + 1

    def transform(self, series: pl.Series) -> Codes:
        values = canonical_ids(series)
        if len(values) == 1 and self.has_binary_search:
            return np.array([self.code(values[0])], np.int32)
        if self.hash_buckets:
            distinct = values.drop_nulls().unique()
            digests = b"".join(map(_digest, distinct.cast(pl.String).cast(pl.Binary).to_list()))
            codes = np.frombuffer(digests, "<u8") % self.hash_buckets + 1
            table = pl.DataFrame({"value": distinct, "code": codes.astype(np.int32)})
        else:
            table = self._codes
        if values.dtype != table["value"].dtype:
            # A text in a vocabulary of numbers, or the reverse: compare as text.
            values = values.cast(pl.String)
            table = table.with_columns(pl.col("value").cast(pl.String))
        joined = values.to_frame("value").join(table, on="value", how="left", maintain_order="left")
        return joined["code"].fill_null(UNKNOWN).to_numpy().astype(np.int32)

    def code(self, value: str | int | None) -> int:
        """Return the code of one value of `canonical_ids`, a hundred times as fast as the join of `transform`."""
        if value is None or self.hash_buckets:
            return _bucket(value, self.hash_buckets)
        # A text in a vocabulary of numbers, or the reverse: compare as text.
        if self.vocabulary.dtype == pl.String:
            value = str(value)
        elif isinstance(value, str):
            number = int(value) if len(value) <= 20 and value.removeprefix("-").isdecimal() else 0
            if str(number) != value:
                return UNKNOWN
            value = number
        place = bisect_left(self.vocabulary, value)
        return place + 1 if place < len(self.vocabulary) and self.vocabulary[place] == value else UNKNOWN

    def field(self, name: str, width: int) -> InputField:
        return InputField(name, "lookup", rows=self.rows, width=width)

    def state(self) -> CategoricalState:
        return CategoricalState(hash_buckets=self.hash_buckets)

    def stored_vocabulary(self) -> pl.Series:
        return self.vocabulary

    @classmethod
    def restore(cls, state: JsonValue, vocabulary: pl.Series | None) -> CategoricalEncoder:
        if vocabulary is None:
            raise KeyError("no vocabulary")
        return cls(vocabulary, CategoricalState.model_validate(state).hash_buckets)


class Categorical(ColumnFeature):
    """One value of a vocabulary, or one of a fixed number of hash buckets, each with an embedding row.

    Use it for ids, cities, brands, and numbers that are names. Row 0 is the *unknown* row: values below the frequency
    cut and values never seen in training. It is trained, as it replaces a share of the known values
    (`model.unknown_rate`). Hash buckets (Weinberger et al. 2009, "Feature Hashing for Large Scale Multitask Learning")
    are for vocabularies that are too large; values of one bucket share an embedding.
    """

    kind = "categorical"
    encoder = CategoricalEncoder
    groups = True
    counts_values = True
    cuts = ("min_count", "min_rate")

    min_count: int = Field(1, ge=1, description="Minimum number of training interactions of a value in the vocabulary.")
    min_rate: float = Field(
        0.0, ge=0, lt=1, description="Minimum share of training interactions of a value in the vocabulary. 0: off."
    )
    hash_buckets: int = Field(0, ge=0, lt=2**31, description="Number of hash buckets. 0: a vocabulary.")

    @property
    def identifies(self) -> bool:
        return not self.hash_buckets

    @property
    def has_code(self) -> bool:
        return True

    def fit(self, series: pl.Series, counts: Ints) -> CategoricalEncoder:
        return CategoricalEncoder.fit(series, counts, self.min_count, self.min_rate, self.hash_buckets)


def _bucket(value: str | int | None, buckets: int) -> int:
    """Return the bucket of a value, 1..buckets, the same on every machine; `UNKNOWN` for None."""
    if value is None:
        return UNKNOWN
    return int.from_bytes(_digest(str(value).encode()), "little") % buckets + 1


def _digest(value: bytes) -> bytes:
    """Return a hash of eight bytes, a little-endian number."""
    return hashlib.blake2b(value, digest_size=8).digest()
