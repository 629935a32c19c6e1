"""Encoders: each kind of feature has one, fitted on the train part, which maps table columns to numpy arrays.

`Encoders` holds the encoders of all features and is written as JSON. The module does not depend on torch.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from operator import index
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt
import polars as pl

from twotower.errors import DataError, RunError, first_line
from twotower.features.schema import (
    SIDES,
    Categorical,
    Feature,
    MultiHot,
    Numeric,
    Pooling,
    Schema,
    Sequence,
    SideName,
    Text,
    Vector,
)

Ints = npt.NDArray[np.int64]
Codes = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]

UNKNOWN = 0
"""Embedding row of values below the frequency cut and values never seen in training."""
SINGLE_ROW_MAX_VALUES = 400
"""Values of a list, or characters of a text, up to which a single row is encoded without data frames, which is faster."""


@dataclass(frozen=True)
class Ragged:
    """Rows of different lengths: row r is `values[offsets[r]:offsets[r + 1]]`.

    `source[i]` is the index of the interaction that `values[i]` comes from; None if it is not kept.
    """

    values: Codes
    offsets: Ints
    source: Ints | None = None

    @classmethod
    def from_pairs(
        cls, rows: npt.NDArray[Any], values: npt.NDArray[Any], n_rows: int, source: Ints | None = None
    ) -> Ragged:
        """Group `values` by `rows` (each 0..n_rows-1), keeping the order within a row."""
        order = np.argsort(rows, kind="stable")
        offsets = np.zeros(n_rows + 1, np.int64)
        np.cumsum(np.bincount(rows, minlength=n_rows), out=offsets[1:])
        return cls(values[order].astype(np.int32), offsets, None if source is None else source[order])

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> Ints:
        return np.diff(self.offsets)

    def take(self, rows: npt.NDArray[np.integer[Any]]) -> Ragged:
        """Return some rows, concatenated."""
        lengths = self.offsets[rows + 1] - self.offsets[rows]
        offsets = np.zeros(len(rows) + 1, np.int64)
        np.cumsum(lengths, out=offsets[1:])
        inside = np.arange(offsets[-1]) - np.repeat(offsets[:-1], lengths)
        return Ragged(self.values[np.repeat(self.offsets[rows], lengths) + inside], offsets)

    def keep_last(self, n: int) -> Ragged:
        """Return every row cut to its last `n` values; 0 keeps all."""
        if n == 0 or not len(self.values):
            return self
        from_end = np.repeat(self.offsets[1:], self.lengths) - np.arange(len(self.values))
        offsets = np.zeros_like(self.offsets)
        np.cumsum(np.minimum(self.lengths, n), out=offsets[1:])
        keep = from_end <= n
        return Ragged(self.values[keep], offsets, None if self.source is None else self.source[keep])


Column = Codes | Floats | Ragged


@dataclass(frozen=True)
class Field:
    """Description of an encoded column, from which a tower makes its embedding."""

    name: str
    kind: Literal["lookup", "bag", "dense"]  # one code, many codes, or numbers
    rows: int = 0  # embedding rows of a lookup or bag
    length: int = 0  # numbers per row of a dense field
    width: int = 0  # embedding width; 0: the width of the tower
    pooling: Pooling = "mean"
    rates: tuple[float, ...] = ()  # rates of the pooling "decay", one mean per rate
    limit: int = 0  # maximum length with the poolings "attention" and "transformer"
    sequence: bool = False  # True for a history, which must not contain the target
    share_with: str = ""  # field of the other side whose embedding it uses
    identifies: bool = False  # True for a lookup of the side's ids


def canonical_ids(series: pl.Series) -> pl.Series:
    """Return a scalar column as Int64, UInt64 or String. 7, 7.0 and '7' are one value, whatever the other values are."""
    dtype = series.dtype
    if dtype.is_float():
        series = series.fill_nan(None)
        whole = series.is_finite() & (series == series.floor()) & (series.abs() < 2**53)
        integers = series.cast(pl.Int64, strict=False)
        if whole.all():
            return integers
        return integers.cast(pl.String).zip_with(whole.fill_null(False), series.cast(pl.String))
    if dtype.is_integer():
        for width in (pl.Int64, pl.UInt64):
            integers = series.cast(width, strict=False)
            if integers.null_count() == series.null_count():
                return integers
    try:
        if not dtype.is_nested():
            return series.cast(pl.String)
    except pl.exceptions.PolarsError:
        pass
    raise DataError(
        f"column '{series.name}': found {dtype}, expected one value a row (text, integers or booleans); "
        "cast it, or choose another kind of feature"
    )


class CategoricalEncoder:
    """Encoder of values as codes: 0 for unknown values, 1..n for the vocabulary in ascending order."""

    def __init__(self, vocabulary: pl.Series, hash_buckets: int = 0) -> None:
        self.vocabulary = vocabulary
        self.hash_buckets = hash_buckets
        self._codes = pl.DataFrame({"value": vocabulary, "code": np.arange(1, len(vocabulary) + 1, dtype=np.int32)})
        self.has_binary_search = vocabulary.is_sorted() and not vocabulary.null_count()
        """True if `code` may be called: the vocabulary is sorted, as `fit` makes it."""

    @classmethod
    def fit(
        cls,
        series: pl.Series,
        counts: Ints,
        min_count: int = 1,
        min_rate: float = 0.0,
        hash_buckets: int = 0,
        total: int | None = None,
    ) -> CategoricalEncoder:
        """Keep the values whose `counts` add up to at least `min_count` and to `min_rate` of `total`, their sum."""
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
            distinct = values.unique()
            codes = [_bucket(v, self.hash_buckets) for v in distinct.to_list()]
            table = pl.DataFrame({"value": distinct, "code": pl.Series(codes, dtype=pl.Int32)})
        else:
            table = self._codes
        if values.dtype != table["value"].dtype:
            # A text in a vocabulary of numbers, or the reverse: compare as text.
            values = values.cast(pl.String)
            table = table.with_columns(pl.col("value").cast(pl.String))
        joined = values.to_frame("value").join(table, on="value", how="left", maintain_order="left")
        return joined["code"].fill_null(UNKNOWN).to_numpy().astype(np.int32)

    def code(self, value: str | int | None) -> int:
        """Return the code of one value of `canonical_ids`, a hundred times as fast as by the join of `transform`."""
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

    def state(self) -> dict[str, Any]:
        return {
            "type": str(self.vocabulary.dtype),
            "values": self.vocabulary.to_list(),
            "hash_buckets": self.hash_buckets,
        }

    @classmethod
    def restore(cls, state: Mapping[str, Any]) -> CategoricalEncoder:
        dtype = {"Int64": pl.Int64, "UInt64": pl.UInt64, "String": pl.String}[state["type"]]
        values = state["values"]
        read = values.cast(dtype) if isinstance(values, pl.Series) else pl.Series(values, dtype=dtype)
        return cls(read.alias("value"), index(state["hash_buckets"]))


def _bucket(value: Any, buckets: int) -> int:
    """Return the bucket of a value, 1..buckets, equal on every machine and in every release; `UNKNOWN` for None."""
    if value is None:
        return UNKNOWN
    digest = hashlib.blake2b(str(value).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % buckets + 1


class NumericEncoder:
    """Encoder of numbers as (x - mean) / deviation (n, 1), or as codes of quantile buckets 1..b, 0 for missing values."""

    def __init__(self, mean: float, deviation: float, edges: list[float], buckets: int) -> None:
        self.mean, self.deviation, self.edges, self.buckets = mean, deviation, edges, buckets

    @classmethod
    def fit(cls, series: pl.Series, used: npt.NDArray[np.bool_], buckets: int) -> NumericEncoder:
        x = _numbers(series)[used]
        x = x[np.isfinite(x)]
        if not len(x):
            return cls(0.0, 1.0, [], buckets)
        edges = np.unique(np.quantile(x, np.arange(1, buckets) / buckets)).tolist() if buckets else []
        deviation = float(x.std())
        return cls(float(x.mean()), deviation if deviation > 1e-12 else 1.0, edges, buckets)

    def transform(self, series: pl.Series) -> Column:
        x = _numbers(series)
        missing = ~np.isfinite(x)
        if self.buckets:
            codes = np.searchsorted(np.asarray(self.edges), x, side="right").astype(np.int32) + 1
            codes[missing] = UNKNOWN
            return codes
        x = np.where(missing, self.mean, x)
        with np.errstate(over="ignore"):  # callers check that the tower's vector is finite
            return ((x - self.mean) / self.deviation).astype(np.float32)[:, None]

    def state(self) -> dict[str, Any]:
        return dict(vars(self))

    @classmethod
    def restore(cls, state: Mapping[str, Any]) -> NumericEncoder:
        edges = [float(edge) for edge in state["edges"]]
        return cls(float(state["mean"]), float(state["deviation"]), edges, index(state["buckets"]))


def _numbers(series: pl.Series) -> npt.NDArray[np.float64]:
    """Return a numeric column as float64, NaN for nulls and non-finite values. Raises DataError for other types."""
    if not (series.dtype.is_numeric() or series.dtype in (pl.Boolean, pl.Null)):
        raise DataError(
            f"column '{series.name}': found {series.dtype}, expected numbers; cast it, or make it categorical"
        )
    x = np.array(series.cast(pl.Float64).to_numpy())  # a null is nan
    x[~np.isfinite(x)] = np.nan
    return x


class MultiHotEncoder:
    """Encoder of lists, or separated text, as rows of codes without unknown values."""

    def __init__(self, values: CategoricalEncoder, separator: str) -> None:
        self.values, self.separator = values, separator

    @classmethod
    def fit(cls, series: pl.Series, counts: Ints, feature: MultiHot) -> MultiHotEncoder:
        rows, flat = _explode(series, feature.separator)
        inner = CategoricalEncoder.fit(flat, counts[rows], feature.min_count, feature.min_rate, total=int(counts.sum()))
        return cls(inner, feature.separator)

    @property
    def rows(self) -> int:
        return self.values.rows

    def transform(self, series: pl.Series) -> Ragged:
        if len(series) == 1 and self.values.has_binary_search:
            flat = _lists(series, self.separator)[0]
            if flat is None or len(flat) <= SINGLE_ROW_MAX_VALUES:
                given = [] if flat is None else canonical_ids(_present(flat).alias(series.name)).to_list()
                return _one_row([code for value in given if (code := self.values.code(value)) != UNKNOWN])
        rows, flat = _explode(series, self.separator)
        codes = self.values.transform(flat)
        known = codes != UNKNOWN
        return Ragged.from_pairs(rows[known], codes[known], len(series))

    def state(self) -> dict[str, Any]:
        return {"separator": self.separator, "values": self.values.state()}

    @classmethod
    def restore(cls, state: Mapping[str, Any]) -> MultiHotEncoder:
        if not isinstance(state["separator"], str):
            raise TypeError(f"the separator is {state['separator']!r:.20}")
        return cls(CategoricalEncoder.restore(state["values"]), state["separator"])


def _present(values: pl.Series) -> pl.Series:
    """Return the values without nulls and empty texts."""
    values = values.drop_nulls()
    return values.filter(values != "") if values.dtype == pl.String else values


def _is_long(texts: pl.Series) -> bool:
    return texts.dtype == pl.String and bool((texts.str.len_chars() > SINGLE_ROW_MAX_VALUES).any())


def _one_row(codes: list[int]) -> Ragged:
    return Ragged(np.array(codes, np.int32), np.array([0, len(codes)]))


def _lists(series: pl.Series, separator: str) -> pl.Series:
    """Return a list column unchanged, or a text column split at the separator. Raises DataError for other types."""
    if separator and series.dtype in (pl.String, pl.Categorical, pl.Enum):
        series = series.cast(pl.String).str.split(separator)
    elif isinstance(series.dtype, pl.Array):
        series = series.arr.to_list()
    if series.dtype == pl.Null:
        series = series.cast(pl.List(pl.String))
    if not isinstance(series.dtype, pl.List):
        raise DataError(
            f"column '{series.name}': found {series.dtype}, expected lists, or text and the feature's separator; "
            "set separator, or make it categorical"
        )
    return series


def _explode(series: pl.Series, separator: str) -> tuple[Ints, pl.Series]:
    """Return row indices and values of a list column, flat, without nulls and empty texts."""
    series = _lists(series, separator)
    flat = series.to_frame("value").with_row_index("row").explode("value").filter(pl.col("value").is_not_null())
    if flat["value"].dtype == pl.String:
        flat = flat.filter(pl.col("value") != "")
    return flat["row"].to_numpy().astype(np.int64), flat["value"].rename(series.name)


class VectorEncoder:
    """Encoder of vectors as floats (n, length), divided by the root mean square of the training vectors' entries.

    Missing vectors and non-finite numbers become zeros."""

    def __init__(self, length: int, scale: float) -> None:
        self.length, self.scale = length, scale

    @classmethod
    def fit(cls, series: pl.Series, used: npt.NDArray[np.bool_], length: int) -> VectorEncoder:
        if not length:
            length = int(_as_lists(series).list.len().drop_nulls().max() or 0)  # type: ignore[arg-type]
        if not length:
            raise DataError(f"column '{series.name}': every vector is missing or empty; drop the feature")
        numbers = cls(length, 1.0).transform(series)[used]
        present = numbers[(numbers != 0).any(1)].astype(np.float64)
        scale = float(np.sqrt((present**2).mean())) if len(present) else 1.0
        return cls(length, scale)

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

    def state(self) -> dict[str, Any]:
        return {"length": self.length, "scale": self.scale}

    @classmethod
    def restore(cls, state: Mapping[str, Any]) -> VectorEncoder:
        return cls(index(state["length"]), float(state["scale"]))


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


# An ideograph, or a run of letters, digits and combining marks, such as vowel signs.
_WORD = r"\p{Han}|[\p{L}\p{M}\p{N}--\p{Han}]+"
_IDEOGRAPH = r"^\p{Han}$"


@functools.lru_cache(maxsize=1 << 16)
def _is_ideograph(character: str) -> bool:
    return bool(pl.Series([character]).str.contains(_IDEOGRAPH)[0])


def words(series: pl.Series) -> tuple[Ints, pl.Series]:
    """Return row indices and words of a text column, flat, in the order of the text, in NFKC and lower case."""
    frame = _words(series).to_frame().with_row_index("row").explode("word").drop_nulls("word")
    return frame["row"].to_numpy().astype(np.int64), frame["word"]


def _words(series: pl.Series) -> pl.Series:
    """Return the list of words of each text."""
    # Lower case twice: NFKC can produce capitals, and the lower case of a letter can be two characters that NFKC joins.
    plain = pl.col("word").str.to_lowercase().str.normalize("NFKC").str.to_lowercase()
    return canonical_ids(series).cast(pl.String).to_frame("word").select(plain.str.extract_all(_WORD)).to_series()


def grams(words: pl.Series, n: int) -> tuple[Ints, pl.Series]:
    """Return row indices and letter n-grams of a column of words, flat: `#go`, `goo`, `ood`, `od#` of `good` for n = 3.

    An ideograph is one gram, and a word shorter than a gram too.
    """
    frame = words.to_frame("word").with_row_index("row")
    ideograph = pl.col("word").str.contains(_IDEOGRAPH)
    frame = frame.with_columns(word=pl.when(ideograph).then(pl.col("word")).otherwise("#" + pl.col("word") + "#"))
    places = (pl.col("word").str.len_chars().cast(pl.Int64) - n + 1).clip(lower_bound=1)
    frame = frame.with_columns(place=pl.int_ranges(0, places)).explode("place")
    frame = frame.select("row", gram=pl.col("word").str.slice(pl.col("place"), n))
    return frame["row"].to_numpy().astype(np.int64), frame["gram"]


@dataclass(frozen=True)
class Grams:
    """Counts of words, grams and collisions of some texts under an encoder (table 1 of Huang et al. 2013)."""

    words: int  # distinct words
    grams: int  # distinct grams
    rows: int  # embedding rows of these grams, without the unknown row
    collisions: int  # words with the same grams as another word
    code_collisions: int  # words with the same codes as another word, after hashing or cutting the vocabulary
    occurrences: int  # occurrences of grams in all texts
    unknown: int  # occurrences of grams that read the unknown row

    def __str__(self) -> str:
        share = self.unknown / max(1, self.occurrences)
        return (
            f"{self.words:,} words, {self.grams:,} grams in {self.rows:,} rows, {share:.2%} of their occurrences "
            f"unknown; {self.collisions:,} words have the grams of another word, {self.code_collisions:,} its codes"
        )


class TextEncoder:
    """Encoder of texts as rows of gram codes, with repeats; `UNKNOWN` for grams outside the vocabulary."""

    def __init__(self, values: CategoricalEncoder, n: int, max_length: int) -> None:
        self.values, self.n, self.max_length = values, n, max_length

    @classmethod
    def fit(cls, columns: list[tuple[pl.Series, Ints]], feature: Text) -> TextEncoder:
        """Fit the vocabulary on `columns` of texts, each with the number of training interactions of its rows. There are
        several if features share grams."""
        if feature.hash_buckets:
            nothing = pl.Series("gram", [], dtype=pl.String)
            return cls(CategoricalEncoder(nothing, feature.hash_buckets), feature.n, feature.max_length)
        found = []
        for series, counts in columns:
            rows, flat = words(series)
            weights = pl.DataFrame({"word": flat, "n": counts[rows]}).group_by("word").agg(pl.col("n").sum())
            which, gram = grams(weights["word"], feature.n)
            found.append(pl.DataFrame({"gram": gram, "n": weights["n"].to_numpy()[which]}))
        kept = (
            pl.concat(found)
            .group_by("gram")
            .agg(pl.col("n").sum())
            .filter(pl.col("n") >= feature.min_count)
            .sort("n", "gram", descending=[True, False])
            .head(feature.max_grams)
        )
        return cls(CategoricalEncoder(kept["gram"].sort()), feature.n, feature.max_length)

    @property
    def rows(self) -> int:
        return self.values.rows

    def transform(self, series: pl.Series) -> Ragged:
        if len(series) == 1 and self.values.has_binary_search and not _is_long(series):
            return self._one(series)
        row, flat = words(series)
        codes, word_index = self._coded(flat)
        found = codes.take(word_index)
        lengths = np.bincount(np.repeat(row, np.diff(found.offsets)), minlength=len(series))
        offsets = np.zeros(len(series) + 1, np.int64)
        np.cumsum(lengths, out=offsets[1:])
        if not self.max_length or int(lengths.max(initial=0)) <= self.max_length:
            return Ragged(found.values, offsets)
        keep = np.arange(len(found.values)) - np.repeat(offsets[:-1], lengths) < self.max_length
        np.cumsum(np.minimum(lengths, self.max_length), out=offsets[1:])
        return Ragged(found.values[keep], offsets)

    def _one(self, series: pl.Series) -> Ragged:
        """Return `transform` of one text, computed without data frames."""
        found = _words(series)[0]
        codes: list[int] = []
        for word in [] if found is None else found.to_list():
            alone = len(word) == 1 and _is_ideograph(word)
            text = word if alone else f"#{word}#"
            codes += [self.values.code(text[i : i + self.n]) for i in range(max(1, len(text) - self.n + 1))]
        return _one_row(codes[: self.max_length or None])

    def _coded(self, flat: pl.Series) -> tuple[Ragged, Ints]:
        """Return the codes of every distinct word, and the index (n,) of each word among the distinct ones."""
        frame = flat.to_frame("word")
        distinct = frame.unique().with_row_index("index")
        index_of_word = frame.join(distinct, on="word", how="left", maintain_order="left")["index"]
        which, gram = grams(distinct["word"], self.n)
        codes = Ragged.from_pairs(which, self.values.transform(gram), distinct.height)
        return codes, index_of_word.to_numpy().astype(np.int64)

    def report(self, series: pl.Series) -> Grams:
        """Return the counts of words, grams and collisions of the texts, without the cut at `max_length`."""
        _, flat = words(series)
        codes, word_index = self._coded(flat)
        distinct = flat.unique()
        which, gram = grams(distinct, self.n)
        code = self.values.transform(gram)
        spread = codes.take(word_index).values
        return Grams(
            words=len(distinct),
            grams=gram.n_unique(),
            rows=int((np.unique(code) != UNKNOWN).sum()),
            collisions=_collisions(which, gram),
            code_collisions=_collisions(which, pl.Series(code)),
            occurrences=len(spread),
            unknown=int((spread == UNKNOWN).sum()),
        )

    def state(self) -> dict[str, Any]:
        return {"n": self.n, "max_length": self.max_length, "values": self.values.state()}

    @classmethod
    def restore(cls, state: Mapping[str, Any]) -> TextEncoder:
        return cls(CategoricalEncoder.restore(state["values"]), index(state["n"]), index(state["max_length"]))


def _collisions(rows: Ints, values: pl.Series) -> int:
    """Return the number of rows that hold the same multiset of values as another row."""
    bags = pl.DataFrame({"row": rows, "value": values}).sort("row", "value").group_by("row").agg("value")
    return int(bags.group_by("value").len().filter(pl.col("len") > 1)["len"].sum())


Encoder = CategoricalEncoder | NumericEncoder | MultiHotEncoder | VectorEncoder | TextEncoder
_KINDS: dict[str, type[Encoder]] = {
    "categorical": CategoricalEncoder,
    "numeric": NumericEncoder,
    "multi_hot": MultiHotEncoder,
    "vector": VectorEncoder,
    "text": TextEncoder,
}


class Encoders:
    """The encoders of all features of both sides, and of each side's ids for sequences."""

    def __init__(
        self,
        schema: Schema,
        by_side: dict[SideName, dict[str, Encoder]],
        ids: dict[SideName, CategoricalEncoder],
    ) -> None:
        self.schema, self.by_side, self.ids = schema, by_side, ids

    @classmethod
    def fit(cls, schema: Schema, frames: Mapping[SideName, pl.DataFrame], counts: Mapping[SideName, Ints]) -> Encoders:
        """Fit all encoders. `counts[side]` (rows,) are the training interactions of each row; rows without any are not
        used."""
        by_side: dict[SideName, dict[str, Encoder]] = {}
        ids: dict[SideName, CategoricalEncoder] = {}
        for side in SIDES:
            frame, n = frames[side], counts[side]
            by_side[side] = {
                f.name: _fit(f, frame[f.source], n) for f in schema.side(side) if not isinstance(f, Sequence | Text)
            }
            other = _other(side)
            for text in schema.texts(side):
                if not text.share_with:
                    borrowers = [f for f in schema.texts(other) if f.share_with == text.name]
                    columns = [(frame[text.source], n), *((frames[other][f.source], counts[other]) for f in borrowers)]
                    by_side[side][text.name] = TextEncoder.fit(columns, text)
            ids[side] = CategoricalEncoder.fit(frame[schema.id_column(side)], n)
        return cls(schema, _with_shared_texts(schema, by_side), ids)

    def transform(self, side: SideName, frame: pl.DataFrame) -> dict[str, Column]:
        """Return the encoded columns of one side by feature name, without the sequences."""
        features = [f for f in self.schema.side(side) if not isinstance(f, Sequence)]
        return {f.name: self.encode(f, frame[f.source]) for f in features}

    def encode(self, feature: Feature, series: pl.Series) -> Column:
        """Encode the column of a feature that is no sequence. Raises DataError for values that it cannot read."""
        if feature.missing == "error" and missing_count(series):
            raise DataError(
                f"column '{feature.source}': {missing_count(series)} of {len(series)} values are missing, "
                f"and feature '{feature.name}' has missing = 'error'; fill them or set missing = 'impute'"
            )
        return self.by_side[feature.side][feature.name].transform(series)

    def sequence_codes(self, feature: Sequence, other_ids: pl.Series) -> Codes:
        """Return the code of every row of the other side in the sequence's embedding table."""
        return self._sequence_encoder(feature)[0].transform(other_ids)

    def _sequence_encoder(self, feature: Sequence) -> tuple[CategoricalEncoder, str]:
        """Return the encoder of a sequence's values, and the feature of the other side that has this encoder, '' for none."""
        other = _other(feature.side)
        shared = self.schema.id_feature(other) if feature.share_embedding else None
        if shared is None:
            return self.ids[other], ""
        return cast(CategoricalEncoder, self.by_side[other][shared.name]), shared.name

    def fields(self, side: SideName) -> tuple[Field, ...]:
        """Return the fields that the tower of `side` embeds, in the schema's order."""
        return tuple(self._field(f) for f in self.schema.side(side))

    def _field(self, feature: Feature) -> Field:
        name, width = feature.name, feature.width
        if isinstance(feature, Sequence):
            encoder_of_values, shares = self._sequence_encoder(feature)
            decays = feature.pooling == "decay"
            limit = feature.max_length if feature.attends else 0
            return Field(
                name, "bag", rows=encoder_of_values.rows, width=width, pooling=feature.pooling,
                rates=feature.rates if decays else (), limit=limit, sequence=True, share_with=shares,
            )  # fmt: skip
        encoder = self.by_side[feature.side][name]
        if isinstance(encoder, CategoricalEncoder):
            identifies = feature == self.schema.id_feature(feature.side)
            return Field(name, "lookup", rows=encoder.rows, width=width, identifies=identifies)
        if isinstance(encoder, MultiHotEncoder):
            return Field(name, "bag", rows=encoder.rows, width=width)
        if isinstance(encoder, TextEncoder):
            assert isinstance(feature, Text)
            return Field(
                name, "bag", rows=encoder.rows, width=width, pooling=feature.pooling, share_with=feature.share_with
            )
        if isinstance(encoder, NumericEncoder):
            if encoder.buckets:
                return Field(name, "lookup", rows=len(encoder.edges) + 2, width=width)
            return Field(name, "dense", length=1, width=width)
        return Field(name, "dense", length=encoder.length, width=width)

    def to_json(self) -> str:
        return json.dumps(
            {
                "sides": {
                    s: {f.name: self.by_side[s][f.name].state() for f in self.schema.side(s) if _keeps_state(f)}
                    for s in SIDES
                },
                "ids": {s: e.state() for s, e in self.ids.items()},
            },
            ensure_ascii=False,
        )

    @classmethod
    def from_json(cls, schema: Schema, text: str) -> Encoders:
        try:
            data = _parsed(schema, text)
            by_side: dict[SideName, dict[str, Encoder]] = {
                s: {f.name: _KINDS[f.kind].restore(data["sides"][s][f.name]) for f in schema.side(s) if _keeps_state(f)}
                for s in SIDES
            }
            ids = {s: CategoricalEncoder.restore(data["ids"][s]) for s in SIDES}
        except (
            KeyError, TypeError, ValueError, OverflowError, RecursionError, AttributeError, pl.exceptions.PolarsError
        ) as e:  # fmt: skip
            raise RunError(
                f"the encoders do not fit the schema of this run ({type(e).__name__}: {first_line(e)})"
            ) from e
        return cls(schema, _with_shared_texts(schema, by_side), ids)

    def text(self, side: SideName, name: str) -> TextEncoder:
        """Return the encoder of a text feature."""
        return cast(TextEncoder, self.by_side[side][name])


_VOCABULARY = pl.Struct({"type": pl.String, "values": pl.List(pl.String), "hash_buckets": pl.Int64})
_STATES: dict[str, pl.DataType] = {
    "categorical": _VOCABULARY,
    "numeric": pl.Struct(
        {"mean": pl.Float64, "deviation": pl.Float64, "edges": pl.List(pl.Float64), "buckets": pl.Int64}
    ),
    "multi_hot": pl.Struct({"separator": pl.String, "values": _VOCABULARY}),
    "vector": pl.Struct({"length": pl.Int64, "scale": pl.Float64}),
    "text": pl.Struct({"n": pl.Int64, "max_length": pl.Int64, "values": _VOCABULARY}),
}


def _parsed(schema: Schema, text: str) -> Any:
    """Return the JSON with vocabularies as columns, parsed by polars without holding the interpreter's lock."""
    sides = {s: {f.name: _STATES[f.kind] for f in schema.side(s) if _keeps_state(f)} for s in SIDES}
    dtype = {
        "sides": pl.Struct({s: pl.Struct(states) for s, states in sides.items() if states}),
        "ids": pl.Struct(dict.fromkeys(SIDES, _VOCABULARY)),
    }
    try:
        return _first(pl.read_json(io.BytesIO(text.encode()), schema=dtype).to_struct())
    except (pl.exceptions.PolarsError, ValueError, IndexError):
        return json.loads(text)  # its errors are more precise, and it accepts a NaN


def _first(column: pl.Series) -> Any:
    """Return the first value, a struct as a dict and a list as a column. Raises ValueError for a missing value in it."""
    if isinstance(column.dtype, pl.Struct):
        return {name: _first(column.struct.field(name)) for name in column.struct.fields}
    value = column[0]
    if value is None or (isinstance(value, pl.Series) and value.null_count()):
        raise ValueError(f"no {column.name}")
    return value


def _other(side: SideName) -> SideName:
    return "item" if side == "user" else "user"


def _keeps_state(feature: Feature) -> bool:
    """Return True if the feature has an encoder of its own, which is written to disk."""
    return not isinstance(feature, Sequence) and not (isinstance(feature, Text) and feature.share_with)


def _with_shared_texts(
    schema: Schema, by_side: dict[SideName, dict[str, Encoder]]
) -> dict[SideName, dict[str, Encoder]]:
    """Add the encoders of text features that share the grams of the other side, and return `by_side`."""
    for side in SIDES:
        for f in schema.texts(side):
            if f.share_with:
                owner = cast(TextEncoder, by_side[_other(side)][f.share_with])
                by_side[side][f.name] = TextEncoder(owner.values, owner.n, f.max_length)
    return by_side


def _fit(feature: Feature, series: pl.Series, counts: Ints) -> Encoder:
    if isinstance(feature, Categorical):
        return CategoricalEncoder.fit(series, counts, feature.min_count, feature.min_rate, feature.hash_buckets)
    if isinstance(feature, Numeric):
        return NumericEncoder.fit(series, counts > 0, feature.buckets)
    if isinstance(feature, MultiHot):
        return MultiHotEncoder.fit(series, counts, feature)
    assert isinstance(feature, Vector)
    return VectorEncoder.fit(series, counts > 0, feature.length)


def missing_count(series: pl.Series) -> int:
    """Return the number of nulls, and in a column of floats also of NaN and infinities."""
    n = series.null_count()
    if series.dtype.is_float():
        n += int((~series.drop_nulls().is_finite()).sum())
    return n
