"""Messages of the library on a terminal."""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Callable

import pytest
from worlds import settings

from twotower.progress import JobProgress, StatusLine
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


class Screen(io.StringIO):
    """A terminal, or the output of a notebook: what is written there, as it is seen."""

    def isatty(self) -> bool:
        return True

    @property
    def lines(self) -> list[str]:
        """Return the lines that are seen, without spaces at their ends."""
        seen = list[str]()
        for line in self.getvalue().split("\n"):
            shown = ""
            for part in line.split("\r"):
                shown = part + shown[len(part) :]
            seen.append(shown.rstrip())
        return seen


def test_progress_on_a_terminal_is_one_line_that_messages_do_not_keep(monkeypatch: pytest.MonkeyPatch) -> None:
    screen, now, seen = Screen(), [0.0], list[str]()
    monkeypatch.setattr(sys, "stdout", screen)

    def passes(progress: Progress, call: Callable[[], None]) -> None:
        now[0] += 1.0
        call()
        seen.append(screen.lines[-1])

    with printed_messages():
        progress = Progress(clock=lambda: now[0])
        progress.on_phase("epochs", settings(train={"epochs": 9}), 3)
        for step in (1, 2, 3):
            passes(progress, lambda: progress.on_step_end(step, 3, 0.5))  # noqa: B023
        log.info("a message")
        ranked = JobProgress(log, "users ranked", 800, clock=lambda: now[0])
        passes(progress, lambda: ranked.advance(200))
        passes(progress, progress.on_value)
    assert seen == [
        "epochs",
        "epochs: 2 of 3 steps of epoch 4 of 9, 1 a second, 0:01 left, loss 0.5000",
        "epochs",
        "epochs: 200 of 800 users ranked, 200 a second, 0:03 left",
        "epochs, 1 value compared",
    ]
    assert screen.lines == ["phase 2 of 3: epochs", "a message", ""]
    assert StatusLine.present is None


def test_a_line_is_no_longer_than_a_terminal_is_wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "30")
    screen = Screen()
    with StatusLine.on(screen):
        assert StatusLine.present
        StatusLine.present.show("x" * 99)
        assert screen.lines == ["x" * 29]
        StatusLine.present.show("short")
        assert screen.lines == ["short"]


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
        "36 of 60 steps of epoch 1, 0.25 a second, 1:36 left, loss 0.5000",
        "51 of 60 steps of epoch 1, 0.25 a second, 0:36 left, loss 0.5000",
        "16 of 60 steps of epoch 1, 0.25 a second, 2:56 left, loss 0.5000",
    ]


def test_without_a_terminal_phases_epochs_and_values_are_lines(
    capsys: pytest.CaptureFixture[str], messages: list[str]
) -> None:
    now = [0.0]
    progress = Progress(clock=lambda: now[0])
    tower = {"fields": ["a"], "layers": []}
    recipe = settings(
        scorers=["trending"],
        model={"pairs": [{"user": tower, "item": tower}] * 2},
        train={"epochs": 5, "patience": 2, "solved": [{"kind": "ials"}]},
    )
    for name in ("reading", "reading", "epochs"):  # a command reads the tables, and the training checks them
        progress.on_phase(name, recipe, 2)
    now[0] = 30.0
    progress.on_epoch_end([{}, {}, {"epoch": 3, "train.loss": 0.25, "train.seconds": 80.0, "validation.auc": 0.75}])
    progress.on_phase("closed forms after the epochs", recipe)
    for _ in range(9):
        now[0] += 15.0
        progress.on_value()
    assert capsys.readouterr().out.splitlines() == [
        "phase 1 of 5: reading",
        "phase 2 of 5: epochs",
        "epoch   3 of 5  loss 0.2500  auc 0.7500 (without recent popularity and pair 1)  80.0 "
        "s, at most 1:00 of epochs left",
        "phase 3 of 5: closed forms after the epochs",
    ]
    assert messages == [f"{n} values compared on validation, 0.067 a second" for n in (4, 8)]
