"""Messages of the library on a terminal."""

from __future__ import annotations

import logging
import sys

import pytest

from twotower.reports.progress import Progress
from twotower.reports.terminal import printed_messages, silenced_messages
from twotower.train.progress import Callback

log = logging.getLogger("twotower.data.somewhere")


def test_messages_are_plain_lines_and_warnings_begin_so(capsys: pytest.CaptureFixture[str]) -> None:
    log.info("before")
    with printed_messages():
        log.info("100% of them: %s")
        log.warning("a title \x1b[31m")
        log.debug("a detail")
        logging.getLogger("another.library").warning("not ours")
        with silenced_messages() as callback:
            log.warning("of another rank")
        log.info("again")
    with printed_messages(str.upper, on_stderr=True):
        log.info("translated")
    log.info("after")
    assert type(callback) is Callback
    assert tuple(capsys.readouterr()) == ("100% of them: %s\nwarning: a title \\u001b[31m\nagain\n", "TRANSLATED\n")
    assert logging.getLogger("twotower").level == logging.NOTSET
    assert not logging.getLogger("twotower").handlers


def test_a_handler_of_the_root_logger_does_not_repeat_a_message(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [logging.StreamHandler(sys.stderr)])
    with printed_messages():
        log.warning("a message")
    log.warning("after")
    assert tuple(capsys.readouterr()) == ("warning: a message\n", "after\n")


def test_a_message_comes_after_the_progress_bar_is_gone(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with printed_messages(), Progress() as progress:
        monkeypatch.setattr(progress, "_live", True)
        progress.on_step_end(1, 9, 0.5)
        shown = [progress._bar is not None]
        log.info("a message")
        assert [*shown, progress._bar is not None] == [True, False]
    assert capsys.readouterr().out.endswith("a message\n")


def test_without_a_terminal_a_line_a_minute_counts_the_steps_of_an_epoch(messages: list[str]) -> None:
    now = [0.0]
    progress = Progress(clock=lambda: now[0])
    for step in range(21, 61):  # twenty of another process, before the training was resumed
        now[0] += 4.0
        progress.on_step_end(step, 60, 0.5)
    for step in range(1, 31):
        now[0] += 4.0
        progress.on_step_end(step, 60, 0.5)
    assert messages == [
        "36 of 60 steps of the epoch, 0.25 a second, 1:36 left",
        "51 of 60 steps of the epoch, 0.25 a second, 0:36 left",
        "16 of 60 steps of the epoch, 0.25 a second, 2:56 left",
    ]
