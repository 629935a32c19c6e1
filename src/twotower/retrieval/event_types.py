"""Types of the events of requests, by the schema of a bundle."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from twotower.errors import DataError, did_you_mean
from twotower.features.events import OTHER_EVENTS
from twotower.features.schema import Schema
from twotower.features.values import UNKNOWN
from twotower.retrieval.event import Event, Told, as_event


class EventTypes:
    """Reads the types of events: whether an event is liked, and its code in histories."""

    def __init__(self, schema: Schema) -> None:
        self._rules = schema.events
        self._codes = {name: code for code, name in enumerate(schema.event_types, 1)}
        self.names = [name for name in schema.events if name != OTHER_EVENTS]
        """Types that the schema names."""

    def code(self, event: Event) -> int:
        """Return the code of an event's type, 0 for one that is not told or not named."""
        return UNKNOWN if event.type is None else self._codes.get(event.type, UNKNOWN)

    def read(self, given: Sequence[Told], stored: bool = False) -> list[Event]:
        """Return the events with what their types say of `liked`, without ignored ones; one that the rule of all others is for has
        no type then, as its code is that of none. Raises DataError for a type that the
        schema does not name; an event that was `stored` under another bundle loses it."""
        events = [as_event(event) for event in given]
        return events if all(e.type is None for e in events) else list(self._read(events, stored))

    def _read(self, events: Sequence[Event], stored: bool) -> Iterator[Event]:
        for event in events:
            if event.type is None:
                yield event
                continue
            rule = self._rules.get(event.type, self._rules.get(OTHER_EVENTS))
            if rule is not None:
                if rule.target != "ignored":
                    yield event._replace(liked=rule.positive, type=event.type if event.type in self._rules else None)
            elif stored:
                yield event._replace(type=None)
            elif not self._rules:
                raise DataError(
                    f"request: the event of item '{event.item:.80}' has the type '{event.type:.80}', and the bundle's log has no types; "
                    "leave out 'event'"
                )
            else:
                raise DataError(
                    f"request: no event type '{event.type:.80}'{did_you_mean(event.type, self.names)} (allowed: "
                    f"{', '.join(self.names)})"
                )
