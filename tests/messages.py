"""Messages of the library, as a list, and errors of one line."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from twotower.errors import DataError


class _ListHandler(logging.Handler):
    def __init__(self, lines: list[str]) -> None:
        super().__init__()
        self.lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@contextmanager
def collected_messages() -> Iterator[list[str]]:
    """Collect the messages of the library while the block runs; the list grows with each."""
    logger, lines = logging.getLogger("twotower"), list[str]()
    handler, level = _ListHandler(lines), logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


@contextmanager
def one_line(error: type[Exception], *words: str) -> Iterator[pytest.ExceptionInfo[Exception]]:
    """Check that the block raises an error of one line that holds all of `words`."""
    with pytest.raises(error) as caught:
        yield caught
    message = str(caught.value)
    assert "\n" not in message
    assert not [word for word in words if word not in message], message


def refused(call: Callable[[], object], *words: str) -> str:
    """Return the message of the DataError that `call` raises: one line that holds all of `words`."""
    with one_line(DataError, *words) as caught:
        call()
    return str(caught.value)
