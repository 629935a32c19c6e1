"""Ids of bundles: a time, later than those of all ids before it, and a digest of the manifest."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from datetime import UTC, datetime, timedelta

_ID = re.compile(r"\d{8}T\d{6}Z-[0-9a-f]{6}")
_STAMP = "%Y%m%dT%H%M%SZ"


def is_bundle_id(name: str) -> bool:
    """Return True for a well-formed id, of any time."""
    return _ID.fullmatch(name) is not None


def stamp_of(name: str) -> str:
    """Return the part of an id that is its time."""
    return name[:16]


def next_stamp(ids: Iterable[str]) -> str:
    """Return the present time, or a second after the latest of `ids` if that is later."""
    return max([datetime.now(UTC), *filter(None, map(_next_second, ids))]).strftime(_STAMP)


def stray_ids(ids: Iterable[str], served: Collection[str]) -> set[str]:
    """Return ids with an invalid time, or a future one that is not in `served`: folders put there by hand."""
    soon = datetime.now(UTC) + timedelta(days=1)
    times = {name: _next_second(name) for name in ids}
    return {name for name, time in times.items() if time is None or (time > soon and name not in served)}


def _next_second(name: str) -> datetime | None:
    """Return a second after the time of an id, None for an invalid time or the last possible one."""
    try:
        return datetime.strptime(stamp_of(name), _STAMP).replace(tzinfo=UTC) + timedelta(seconds=1)
    except (ValueError, OverflowError):
        return None
