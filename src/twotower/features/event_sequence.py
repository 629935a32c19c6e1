"""Feature `event_sequence`: the types of the interactions of a row."""

from __future__ import annotations

from typing import TYPE_CHECKING

from twotower.arrays.types import Codes
from twotower.features.feature import FactHistory, HistoryFacts

if TYPE_CHECKING:
    from twotower.features.schema import Schema


class EventSequence(FactHistory):
    """The event type of each training interaction of a row, such as view, cart or buy.

    Each type that `schema.events` names has an embedding row; all others share one. Use it in `beside` of a sequence,
    where types predict the next interaction. Its embeddings are added to those of the items, so use a pooling with an
    activation, such as `transformer`: a mean of sums is the sum of the means. A request gives the type of each event;
    an event without a type adds nothing.
    """

    kind = "event_sequence"
    reads_types = True

    def check(self, schema: Schema) -> None:
        if not schema.event:
            raise ValueError(
                f"event sequence {self.name!r} needs the types of events; name their column in schema.event, and the "
                "types in schema.events"
            )

    def codes(self, facts: HistoryFacts) -> Codes:
        return facts.types

    def rows(self, schema: Schema) -> int:
        return len(schema.event_types) + 1
