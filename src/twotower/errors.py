"""Errors that a user can cause and correct, of one base class; exit code 2 on the command line.

A message is one line: the given value, the allowed ones, a remedy. A question is a few. Arguments are in backticks
(`resume=True`).
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterable, Sequence
from functools import lru_cache


class TwoTowerError(Exception):
    """Base of all errors of this package for bad input, with the `exit_code` of the command line."""

    exit_code = 2


class ConfigError(TwoTowerError):
    """A setting, schema or argument that cannot be used."""


class DataError(TwoTowerError):
    """A table, file or value that cannot be used."""


class OpenRoles(DataError):
    """Columns of a log that have several readings: `lines` say which, and a column for each of the `arguments` settles
    it, or what `hint` says."""

    def __init__(self, message: str, lines: Sequence[str] = (), arguments: Sequence[str] = (), hint: str = "") -> None:
        super().__init__(message)
        self.lines, self.arguments, self.hint = lines, arguments, hint


class RunError(TwoTowerError):
    """A run folder, store or checkpoint that is missing, damaged or does not match."""


class BundleError(RunError):
    """A store or bundle is unusable.

    `reason` labels counters: store, locked, write, recall, challenge, probe, current, missing, unreadable, manifest,
    schema_version, kinds, path, unlisted, size, checksum, mismatch, tower."""

    def __init__(self, message: str, reason: str = "bundle") -> None:
        super().__init__(message)
        self.reason = reason


class Unavailable(TwoTowerError):
    """A remote service does not answer in time. `reason` is a label for counters."""

    reason = "unavailable"


class MissingPackage(ConfigError, ImportError):
    """A package of an extra is not installed."""


@lru_cache(maxsize=1024)
def warn_once(message: str) -> None:
    """Log a warning, unless this process has logged it before."""
    logging.getLogger(__name__).warning(message)


_EXTRAS = {
    "torch": "train", "safetensors": "train", "tomli_w": "train", "jinja2": "train", "duckdb": "train",
    "obstore": "bucket", "ray": "ray", "deltalake": "delta", "pyiceberg": "iceberg", "pymilvus": "milvus",
    "grpc": "milvus",
}  # fmt: skip
"""Package -> the extra that installs it."""


def install_command(extra: str) -> str:
    """Return the commands that install an extra, from a checkout and from a wheel, for a message."""
    return f"pip install -e '.[{extra}]' in a checkout, or pip install 'WHEEL[{extra}]'"


def missing_package(error: ModuleNotFoundError, what: str) -> MissingPackage | None:
    """Return the error that `what` needs a package of an extra; None if no extra has the missing module."""
    package = (error.name or "").partition(".")[0]
    if (extra := _EXTRAS.get(package)) is None:
        return None
    return MissingPackage(f"{what} needs {package}, of the extra '{extra}': {install_command(extra)}")


class TrainingError(TwoTowerError):
    """Training stopped: the loss or the weights are not finite, or another rank is lost."""

    exit_code = 1


class Interrupted(TwoTowerError):
    """SIGTERM or SIGINT (`exit_code` 143 or 130) stopped the training before the first step, or after a checkpoint."""

    exit_code = 143


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type if it has none."""
    return (str(error).splitlines() or [""])[0] or type(error).__name__


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return `; did you mean 'x'?` for the known name closest to `name`, or an empty string."""
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean '{match[0]}'?" if match else ""


def listed(words: Sequence[str]) -> str:
    """Return one word or more as a list in a sentence: a, b and c."""
    return " and ".join([*([", ".join(words[:-1])] if words[:-1] else []), words[-1]])
