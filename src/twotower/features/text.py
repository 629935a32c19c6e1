"""Encoder of texts as letter n-grams."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import polars as pl
from pydantic import JsonValue

from twotower.arrays.ragged import Ragged, offsets_of
from twotower.arrays.types import Ints
from twotower.features.categorical import CategoricalEncoder
from twotower.features.schema import Text
from twotower.features.state import Count, EncoderState
from twotower.features.values import UNKNOWN, canonical_ids, is_long, one_row

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


class TextState(EncoderState):
    """State of a `TextEncoder` without its vocabulary."""

    n: Count
    max_length: Count
    hash_buckets: Count


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
        if len(series) == 1 and self.values.has_binary_search and not is_long(series):
            return self._one(series)
        row, flat = words(series)
        codes, word_index = self._coded(flat)
        found = codes.take(word_index)
        lengths = np.bincount(np.repeat(row, np.diff(found.offsets)), minlength=len(series))
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
        return one_row(codes[: self.max_length or None])

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

    @property
    def vocabulary(self) -> pl.Series:
        return self.values.vocabulary

    def state(self) -> TextState:
        return TextState(n=self.n, max_length=self.max_length, hash_buckets=self.values.hash_buckets)

    @classmethod
    def restore(cls, state: JsonValue, vocabulary: pl.Series) -> TextEncoder:
        found = TextState.model_validate(state)
        return cls(CategoricalEncoder(vocabulary, found.hash_buckets), found.n, found.max_length)


def _collisions(rows: Ints, values: pl.Series) -> int:
    """Return the number of rows that hold the same multiset of values as another row."""
    bags = pl.DataFrame({"row": rows, "value": values}).sort("row", "value").group_by("row").agg("value")
    return int(bags.group_by("value").len().filter(pl.col("len") > 1)["len"].sum())
