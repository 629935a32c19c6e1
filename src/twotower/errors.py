"""The errors a user can cause and mend: one family, one line each, exit code 2 on the command line.

A message names what was given, what is allowed and what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class TwoTowerError(Exception):
    """Base of everything this package raises for bad input; `exit_code` is the command line's."""

    exit_code = 2


class ConfigError(TwoTowerError):
    """A setting, schema or command-line flag that cannot be used."""


class DataError(TwoTowerError):
    """A table, file or value that cannot be used."""


class RunError(TwoTowerError):
    """A run folder or checkpoint that is missing, damaged or does not match."""


class Unavailable(TwoTowerError):
    """A service that this one asks does not answer in time; it may later. `reason` is a word for counters."""

    reason = "unavailable"


class TrainingError(TwoTowerError):
    """Training cannot go on: the loss or the weights are no longer finite."""

    exit_code = 1


class Interrupted(TwoTowerError):
    """SIGTERM or SIGINT arrived; the step was finished and a checkpoint written."""

    exit_code = 143


def first_line(error: BaseException) -> str:
    """The message of a library's error, or its kind if it has none."""
    return (str(error).splitlines() or [""])[0] or type(error).__name__


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the known name closest to `name`, or an empty string."""
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean '{match[0]}'?" if match else ""
