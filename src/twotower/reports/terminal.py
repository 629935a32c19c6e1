"""Lines, answers and messages of the library on a terminal."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from twotower.escaping import escape_controls
from twotower.progress import StatusLine
from twotower.train.progress import Callback

if TYPE_CHECKING:
    from twotower.retrieval.request import Answer

log = logging.getLogger("twotower")


def print_line(line: str) -> None:
    """Print a line, with control characters in data escaped."""
    StatusLine.clear()
    print(escape_controls(line), flush=True)


def print_answer(answer: Answer, as_json: bool) -> None:
    """Print an answer: its items with their scores, or the whole answer as JSON."""
    if as_json:
        print_line(answer.to_json())
        return
    notes = {
        "model": "",
        "cold_start": ", an unknown user by the tower alone",
        "popular": ", no known word in the text: popular items"
        if answer.unknown
        else ", an unknown user: popular items",
        "fallback": ", the index does not answer: popular items",
    }
    print_line(f"bundle {answer.bundle_id}, method {answer.method}{notes[answer.source]}, {answer.milliseconds:.1f} ms")
    for place, item in enumerate(answer.items, 1):
        print_line(f"{place:>3}. {item.title}  (id {item.id}, {item.score:+.3f})")
    if answer.unknown:
        print_line(f"unknown to the model, left out: {', '.join(answer.unknown)}")
    if answer.truncated:
        print("no more items")


class MessageHandler(logging.Handler):
    """Prints each message of the library as a line. A warning begins with "warning: "."""

    def __init__(self, translate: Callable[[str], str] = str, on_stderr: bool = False) -> None:
        super().__init__()
        self.translate, self.on_stderr = translate, on_stderr

    def emit(self, record: logging.LogRecord) -> None:
        StatusLine.clear()
        line = f"{'warning: ' if record.levelno >= logging.WARNING else ''}{self.translate(record.getMessage())}"
        print(escape_controls(line), flush=True, file=sys.stderr if self.on_stderr else sys.stdout)


@contextmanager
def printed_messages(translate: Callable[[str], str] = str, on_stderr: bool = False) -> Iterator[None]:
    """Print translated messages of the library and the progress of its jobs, on standard output or error, in the block.

    They do not reach handlers of the root logger; importing fbgemm_gpu installs one."""
    handler, level, propagate = MessageHandler(translate, on_stderr), log.level, log.propagate
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
    try:
        with StatusLine.on(sys.stderr if on_stderr else sys.stdout):
            yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
        log.propagate = propagate


@contextmanager
def silenced_messages() -> Iterator[Callback]:
    """Print nothing while the block runs; yield a callback that prints nothing either."""
    level = log.level
    log.setLevel(logging.CRITICAL + 1)
    try:
        yield Callback()
    finally:
        log.setLevel(level)
