"""Ids of bundles rise, whatever the clock and the folders beside them say."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from twotower.store.bundle import is_bundle_id, next_stamp, stamp_of, stray_ids


def at(time: datetime) -> str:
    return time.strftime("%Y%m%dT%H%M%SZ-abcdef")


def test_a_stamp_is_the_present_or_a_second_after_the_latest_id() -> None:
    now = datetime.now(UTC)
    assert next_stamp([]) >= stamp_of(at(now))
    assert next_stamp(["20010101T000000Z-abcdef", "99999999T000000Z-abcdef"]) >= stamp_of(at(now))
    later = now.replace(microsecond=0) + timedelta(hours=1)
    assert next_stamp([at(later), "20010101T000000Z-abcdef"]) == stamp_of(at(later + timedelta(seconds=1)))


def test_strays_have_no_time_or_one_to_come_that_was_never_served() -> None:
    soon, far = (at(datetime.now(UTC) + timedelta(days=days)) for days in (0.5, 2))
    invalid, last = "20269901T000000Z-abcdef", "99991231T235959Z-abcdef"
    assert stray_ids([soon, far, invalid, last], set()) == {far, invalid, last}
    assert stray_ids([soon, far, invalid, last], {far}) == {invalid, last}


@pytest.mark.parametrize(
    "name",
    ["", ".tmp-20260101T000000Z", "20260101T000000Z-ABCDEF", "../20260101T000000Z-abcdef", "٢٠٢٦٠١٠١T٠٠٠٠٠٠Z-abcdef"],
)
def test_another_name_is_no_id(name: str) -> None:
    assert is_bundle_id("20260101T000000Z-abcdef")
    assert not is_bundle_id(name)
