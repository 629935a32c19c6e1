"""Feature `text`: words as letter n-grams."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import numpy as np
import polars as pl
from pydantic import Field, JsonValue, model_validator

from twotower.arrays.ragged import Ragged, offsets_of
from twotower.arrays.types import Codes, Ints
from twotower.features.categorical import CategoricalEncoder
from twotower.features.encoder import Count, Doubt, Encoder, EncoderState, Report
from twotower.features.feature import ColumnFeature
from twotower.features.field import InputField, PoolingSpec
from twotower.features.side import other_side
from twotower.features.values import UNKNOWN, canonical_ids, is_long, one_row

if TYPE_CHECKING:
    from twotower.features.schema import Schema

# An ideograph, or a run of letters, digits and combining marks, such as vowel signs.
_WORD = r"\p{Han}|[\p{L}\p{M}\p{N}--\p{Han}]+"

_IDEOGRAPH = r"^\p{Han}$"


@functools.lru_cache(maxsize=1 << 16)
def _is_ideograph(character: str) -> bool:
    return bool(pl.Series([character]).str.contains(_IDEOGRAPH)[0])


def words(series: pl.Series) -> tuple[Ints, pl.Series]:
    """Return the flat row indices and words of a text column, in order, in NFKC and lower case."""
    frame = _words(series).to_frame().with_row_index("row").explode("word").drop_nulls("word")
    return frame["row"].to_numpy().astype(np.int64), frame["word"]


def _words(series: pl.Series) -> pl.Series:
    """Return the list of words of each text."""
    # Lower case twice: NFKC can produce capitals, and the lower case of a letter can be two characters that NFKC joins.
    plain = pl.col("word").str.to_lowercase().str.normalize("NFKC").str.to_lowercase()
    return canonical_ids(series).cast(pl.String).to_frame("word").select(plain.str.extract_all(_WORD)).to_series()


def grams(words: pl.Series, n: int) -> tuple[Ints, pl.Series]:
    """Return the flat row indices and letter n-grams of words: `#go`, `goo`, `ood`, `od#` of `good` for n = 3.

    An ideograph is one gram, as is a word shorter than n.
    """
    frame = words.to_frame("word").with_row_index("row")
    ideograph = pl.col("word").str.contains(_IDEOGRAPH)
    frame = frame.with_columns(word=pl.when(ideograph).then(pl.col("word")).otherwise("#" + pl.col("word") + "#"))
    places = (pl.col("word").str.len_chars().cast(pl.Int64) - n + 1).clip(lower_bound=1)
    frame = frame.with_columns(place=pl.int_ranges(0, places)).explode("place")
    frame = frame.select("row", gram=pl.col("word").str.slice(pl.col("place"), n))
    return frame["row"].to_numpy().astype(np.int64), frame["gram"]


@dataclass(frozen=True)
class Grams(Report):
    """Counts of the words, grams and collisions of texts under an encoder (table 1 of Huang et al. 2013)."""

    words: int  # distinct words
    grams: int  # distinct grams
    rows: int  # embedding rows of these grams, without the unknown row
    collisions: int  # words with the same grams as another word
    code_collisions: int  # words with the same codes as another word, after hashing or cutting the vocabulary
    occurrences: int  # occurrences of grams in all texts
    unknown: int  # occurrences of grams that read the unknown row
    fine = "The words of texts have distinct codes, and few grams of the test rows are unknown."

    def __str__(self) -> str:
        share = self.unknown / max(1, self.occurrences)
        return (
            f"{self.words:,} words, {self.grams:,} grams in {self.rows:,} rows, {share:.2%} of their occurrences "
            f"unknown; {self.collisions:,} words have the grams of another word, {self.code_collisions:,} its codes"
        )

    def doubts(self, name: str, test: Self) -> Iterator[Doubt]:
        merged = self.code_collisions / max(1, self.words)
        unknown = test.unknown / max(1, test.occurrences)
        evidence = {"words": float(self.words), "merged": merged, "unknown": unknown}
        if merged >= 0.01:
            yield Doubt(
                f"{merged:.1%} of the {self.words:,} words of the {name} have the same codes as another word "
                f"({self.collisions:,} the same grams): the tower cannot distinguish them. Raise its max_grams, "
                "hash_buckets or n, or lower its min_count.",
                evidence,
            )
        if unknown >= 0.1:
            yield Doubt(
                f"{unknown:.1%} of the grams of the {name} are unknown in the test rows, and all unknown grams share "
                "one row. Raise its max_grams, lower its min_count or n, or set hash_buckets.",
                evidence,
            )


class TextState(EncoderState):
    """State of a `TextEncoder` without its vocabulary."""

    n: Count
    max_length: Count
    hash_buckets: Count
    distinct: bool


class TextEncoder(Encoder):
    """Encoder of texts as rows of gram codes, with repeats unless `distinct`; `UNKNOWN` for unknown grams."""

    reports = True

    def __init__(self, values: CategoricalEncoder, n: int, max_length: int, distinct: bool = False) -> None:
        self.values, self.n, self.max_length, self.distinct = values, n, max_length, distinct

    def transform(self, series: pl.Series) -> Ragged:
        if len(series) == 1 and self.values.has_binary_search and not is_long(series):
            return self._one(series)
        row, flat = words(series)
        codes, word_index = self._coded(flat)
        found = codes.take(word_index)
        lengths = np.bincount(np.repeat(row, np.diff(found.offsets)), minlength=len(series))
        if self.distinct:
            found, lengths = _once(found.values, lengths)
        offsets = offsets_of(lengths)
        if not self.max_length or int(lengths.max(initial=0)) <= self.max_length:
            return Ragged(found.values, offsets)
        keep = np.arange(len(found.values)) - np.repeat(offsets[:-1], lengths) < self.max_length
        return Ragged(found.values[keep], offsets_of(np.minimum(lengths, self.max_length)))

    def _one(self, series: pl.Series) -> Ragged:
        """Return `transform` of one text, computed without data frames."""
        found = _words(series)[0]
        codes: list[int] = []
        for word in [] if found is None else found.to_list():
            alone = len(word) == 1 and _is_ideograph(word)
            text = word if alone else f"#{word}#"
            codes += [self.values.code(text[i : i + self.n]) for i in range(max(1, len(text) - self.n + 1))]
        return one_row([*(dict.fromkeys(codes) if self.distinct else codes)][: self.max_length or None])

    def _coded(self, flat: pl.Series) -> tuple[Ragged, Ints]:
        """Return the codes of every distinct word, and the index (n,) of each word among them."""
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

    def field(self, name: str, width: int) -> InputField:
        return InputField(name, "bag", rows=self.values.rows, width=width)

    def state(self) -> TextState:
        return TextState(
            n=self.n, max_length=self.max_length, hash_buckets=self.values.hash_buckets, distinct=self.distinct
        )

    def stored_vocabulary(self) -> pl.Series:
        return self.values.vocabulary

    @classmethod
    def restore(cls, state: JsonValue, vocabulary: pl.Series | None) -> TextEncoder:
        found = TextState.model_validate(state)
        values = CategoricalEncoder.restore({"hash_buckets": found.hash_buckets}, vocabulary)
        return cls(values, found.n, found.max_length, found.distinct)


class Text(ColumnFeature):
    """Words as letter n-grams: the bag of the grams of a text (word hashing, Huang et al. 2013, "Learning Deep
    Structured Semantic Models for Web Search using Clickthrough Data", section 3.2).

    Use it for titles and search queries, whose misspelt and unseen words share grams with known words. The text is
    normalised (NFKC, lower case) and split into words, runs of letters and digits of any script; `good` gives `#go`,
    `goo`, `ood` and `od#`. An ideograph is a gram of its own. Row 0 is the *unknown* row of all grams outside the
    vocabulary; it is trained on grams that `min_count` and `max_grams` leave out.
    """

    kind = "text"
    encoder = TextEncoder
    column_type = "text"
    searchable = True
    counts_values = True
    cuts = ("min_count", "max_grams")
    of_model = ("width", "pooling")

    n: int = Field(3, ge=2, le=8, description="Letters of a gram, with the word boundaries '#'.")
    max_grams: int = Field(30_000, ge=1, description="Maximum size of the vocabulary, the most frequent grams.")
    min_count: int = Field(1, ge=1, description="Minimum number of occurrences of a gram in training interactions.")
    hash_buckets: int = Field(0, ge=0, lt=2**31, description="Number of hash buckets. 0: a vocabulary.")
    pooling: PoolingSpec = Field(
        PoolingSpec(kind="sum"), description="Pooling of the grams' embeddings, of a kind that ignores their order."
    )
    max_length: int = Field(
        1_000, ge=0, lt=2**31, description="Maximum number of grams of a text, from its beginning. 0: unlimited."
    )
    distinct: bool = Field(False, description="Each gram of a text counts once. false: as often as it occurs.")
    share_with: str = Field(
        "", description="Text feature of the other side whose vocabulary and embedding this one shares. Empty: none."
    )

    @model_validator(mode="after")
    def _check(self) -> Text:
        own = ("n", "max_grams", "min_count", "hash_buckets")
        if self.share_with and (set_ := self.set_options(own)):
            raise ValueError(f"'{set_[0]}' is that of '{self.share_with}', whose grams it shares; set it there")
        return self

    @property
    def shares(self) -> str:
        return self.share_with

    def check(self, schema: Schema) -> None:
        other = other_side(self.side)
        own = [f.name for f in schema.tower(other) if isinstance(f, Text) and not f.share_with]
        if self.share_with and self.share_with not in own:
            raise ValueError(
                f"text {self.name!r} shares the grams of {self.share_with!r}, which is no text feature of the "
                f"{other} side with grams of its own (allowed: {', '.join(own) or 'none'})"
            )

    def fit(self, series: pl.Series, counts: Ints) -> TextEncoder:
        if self.hash_buckets:
            nothing = pl.Series("gram", [], dtype=pl.String)
            return TextEncoder(CategoricalEncoder(nothing, self.hash_buckets), self.n, self.max_length, self.distinct)
        rows, flat = words(series)
        weights = pl.DataFrame({"word": flat, "n": counts[rows]}).group_by("word").agg(pl.col("n").sum())
        which, gram = grams(weights["word"], self.n)
        kept = (
            pl.DataFrame({"gram": gram, "n": weights["n"].to_numpy()[which]})
            .group_by("gram")
            .agg(pl.col("n").sum())
            .filter(pl.col("n") >= self.min_count)
            .sort("n", "gram", descending=[True, False])
            .head(self.max_grams)
        )
        return TextEncoder(CategoricalEncoder(kept["gram"].sort()), self.n, self.max_length, self.distinct)

    def borrow(self, encoder: Encoder) -> TextEncoder:
        assert isinstance(encoder, TextEncoder)
        return TextEncoder(encoder.values, encoder.n, self.max_length, self.distinct)

    def request_type(self, dtype: pl.DataType) -> pl.DataType:
        """Return text, as a request may give any text even for a column of digits."""
        return pl.String()


def _once(values: Codes, lengths: Ints) -> tuple[Ragged, Ints]:
    """Return the codes of rows of `lengths` (U,) without repeats in a row, and the new lengths."""
    row = np.repeat(np.arange(len(lengths)), lengths)
    _, first = np.unique(row << 32 | values, return_index=True)
    first.sort()
    kept = np.bincount(row[first], minlength=len(lengths))
    return Ragged(values[first], offsets_of(kept)), kept


def _collisions(rows: Ints, values: pl.Series) -> int:
    """Return the number of rows that hold the same multiset of values as another row."""
    bags = pl.DataFrame({"row": rows, "value": values}).sort("row", "value").group_by("row").agg("value")
    return int(bags.group_by("value").len().filter(pl.col("len") > 1)["len"].sum())
