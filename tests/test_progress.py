"""Progress lines and summaries of jobs."""

from __future__ import annotations

import logging
import threading

import pytest

from twotower.progress import JobProgress, Summary, doing, duration


def test_a_line_is_logged_at_most_every_few_seconds_with_rate_and_time_left(messages: list[str]) -> None:
    now = [0.0]
    progress = JobProgress(logging.getLogger("twotower.test"), "users embedded", 8_000, clock=lambda: now[0])
    for second in range(1, 11):
        now[0] = float(second)
        progress.advance(200)
    assert messages == [
        "1,000 of 8,000 users embedded, 200 a second, 0:35 left",
        "2,000 of 8,000 users embedded, 200 a second, 0:30 left",
    ]


def test_units_of_an_earlier_call_do_not_enter_the_rate() -> None:
    now = [0.0]
    progress = JobProgress(logging.getLogger("twotower.test"), "rows", 100, clock=lambda: now[0])
    progress.skip(50)
    now[0] = 5.0
    progress.done += 25
    assert progress.line() == "75 of 100 rows, 5 a second, 0:05 left"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0:00"), (7, "0:07"), (59.6, "1:00"), (3_600, "1:00:00"), (7_387, "2:03:07")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_summary_says_what_was_read_kept_and_dropped() -> None:
    summary = Summary("interactions", read=1_000)
    assert str(summary) == "interactions: 1,000 read, 1,000 kept"
    summary.drop("repeated a pair", 2)
    summary.drop("repeated a pair", 1)
    summary.drop("had no time", 0)
    assert str(summary) == "interactions: 1,000 read, 997 kept; dropped: 3 repeated a pair"


def test_what_takes_long_is_said_and_what_does_not_is_not(messages: list[str]) -> None:
    said = threading.Event()

    class Hears(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.set()

    log = logging.getLogger("twotower")
    log.addHandler(hears := Hears())

    @doing("looking at nothing")
    def short() -> None:
        pass

    @doing("looking at much", seconds=0.0)
    def long() -> None:
        assert said.wait(60)

    try:
        short()
        long()
    finally:
        log.removeHandler(hears)
    assert messages == ["looking at much …"]
