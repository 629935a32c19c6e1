"""Evidence that texts of users are searches for titles of items: the words that both share, against shuffled items."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import polars as pl

MIN_SHARED = 0.2
"""Share of rows whose two texts share a word, from which texts of users may be queries."""
MIN_TIMES = 2.0
"""Times that such rows are more frequent than among shuffled items, from which texts of users may be queries."""
SAMPLED_PAIRS = 20_000
"""Rows that are compared at most."""
SHUFFLES = 5

_WORDS = r"\p{Han}|[\p{L}\p{N}--\p{Han}]+"


@dataclass(frozen=True)
class QueryEvidence:
    """Shares of rows, from 0 to 1, whose text of the user and text of the item have a word in common."""

    shared: float
    shuffled: float
    """The same with the items of the rows shuffled, the mean of SHUFFLES."""

    @property
    def exists(self) -> bool:
        """True if words are shared often, and clearly more often than by chance."""
        return self.shared >= MIN_SHARED and self.shared >= MIN_TIMES * self.shuffled

    def __str__(self) -> str:
        return (
            f"{self.shared:.1%} of the rows share a word of the two (threshold {MIN_SHARED:.0%}), {self.shuffled:.1%} with "
            f"shuffled items (threshold {MIN_TIMES:g} times as many)"
        )


def query_evidence(queries: pl.Series, titles: pl.Series) -> QueryEvidence:
    """Return the evidence of the texts of users and items of rows, two columns of text of one length."""
    rng = np.random.default_rng(0)
    rows = rng.permutation(len(queries))[:SAMPLED_PAIRS]
    asked, found = (_words(texts.gather(rows)) for texts in (queries, titles))
    shuffled = [_shared(asked, found.gather(rng.permutation(len(found)))) for _ in range(SHUFFLES)]
    return QueryEvidence(_shared(asked, found), float(np.mean(shuffled)))


def _words(texts: pl.Series) -> pl.Series:
    """Return the lists of the words of texts, in lower case; a Han character is a word."""
    return texts.fill_null("").str.to_lowercase().str.extract_all(_WORDS)


def _shared(one: pl.Series, other: pl.Series) -> float:
    frame = pl.DataFrame({"one": one, "other": other})
    return float(frame.select((pl.col("one").list.set_intersection("other").list.len() > 0).mean()).item() or 0)
