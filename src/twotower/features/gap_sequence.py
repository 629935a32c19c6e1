"""Feature `gap_sequence`: the times between the interactions of a row."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from pydantic import Field

from twotower.arrays.types import Codes
from twotower.features.feature import FactHistory, HistoryFacts, check_times
from twotower.features.values import UNKNOWN

if TYPE_CHECKING:
    from twotower.features.schema import Schema

MICROSECONDS_OF_A_SECOND = 1_000_000


class GapSequence(FactHistory):
    """The time before each interaction of a history, in buckets that double, each with an embedding.

    These are the intervals of Li et al. 2020, "Time Interval Aware Self-Attention for Sequential Recommendation",
    section 3.2, between neighbours only. A gap of s seconds is in bucket 1 + log2(1 + s), rounded down: 1 below a
    second, 6 at a minute, 17 at a day. The first interaction and unknown times have a row of their own. Use it in
    `beside` of a sequence, where visits matter. For the gap up to the request add `days_since_previous`.
    """

    kind = "gap_sequence"

    buckets: int = Field(32, ge=2, le=64, description="Number of buckets. The last one holds all longer gaps.")

    def check(self, schema: Schema) -> None:
        check_times(schema, f"gap sequence {self.name!r}")

    def codes(self, facts: HistoryFacts) -> Codes:
        gaps = np.diff(facts.times, prepend=facts.times[:1])
        known = ~facts.first & (facts.times >= 0) & (np.roll(facts.times, 1) >= 0)
        seconds = np.maximum(gaps, 0) / MICROSECONDS_OF_A_SECOND
        buckets = np.minimum(1 + np.floor(np.log2(1 + seconds)), self.buckets)
        return np.where(known, buckets, UNKNOWN).astype(np.int32)

    def rows(self, schema: Schema) -> int:
        return self.buckets + 1
