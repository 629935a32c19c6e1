"""Types of the events of requests, by the schema of a bundle."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from twotower.errors import DataError, did_you_mean
from twotower.features.schema import OTHER_EVENTS, EventRule, Schema
from twotower.features.values import UNKNOWN
from twotower.retrieval.event import Event, Told, as_event
from twotower.retrieval.request import Request


class EventTypes:
    """Reads the types of events: whether an event counts, whether it is liked, and its code in histories."""

    def __init__(self, schema: Schema) -> None:
        self._rules = schema.events
        self._ignores = any(rule.target == "ignored" for rule in schema.events.values())
        self._codes = {name: code for code, name in enumerate(schema.event_types, 1)}
        self.names = [name for name in schema.events if name != OTHER_EVENTS]
        """Types that the schema names."""

    def code(self, event: Event) -> int:
        """Return the code of an event's type, 0 for one that is not told or not named."""
        return UNKNOWN if event.type is None else self._codes.get(event.type, UNKNOWN)

    def without_ignored(self, request: Request) -> Request:
        """Return a request as if it told no event of an ignored type: such rows of the log are left out, too."""
        if not self._ignores or not any(map(self._is_ignored, request.told)):
            return request
        history = None if request.history is None else self._counted(request.history)
        return replace(request, history=history, events=self._counted(request.events))

    def read(self, given: Sequence[Told], stored: bool = False) -> list[Event]:
        """Return the events with what their types say of `liked`, without ignored ones; one that the rule of all others is for has
        no type then, as its code is that of none. Raises DataError for a type that the
        schema does not name; an event that was `stored` under another bundle loses it."""
        events = [as_event(event) for event in given]
        return events if all(e.type is None for e in events) else list(self._read(events, stored))

    def _rule(self, event: Event) -> EventRule | None:
        """Return the rule of an event's type; None for one that is not told, or that no rule is for."""
        return None if event.type is None else self._rules.get(event.type, self._rules.get(OTHER_EVENTS))

    def _is_ignored(self, event: Event) -> bool:
        rule = self._rule(event)
        return rule is not None and rule.target == "ignored"

    def _counted(self, told: Sequence[Told]) -> list[Event]:
        """Return the events that count, with their types."""
        return [event for event in map(as_event, told) if not self._is_ignored(event)]

    def _read(self, events: Sequence[Event], stored: bool) -> Iterator[Event]:
        for event in events:
            if event.type is None:
                yield event
                continue
            rule = self._rule(event)
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
