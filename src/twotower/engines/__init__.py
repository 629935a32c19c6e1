"""Engines that run the shards of a job, one file each."""

from __future__ import annotations

from collections.abc import Mapping

from twotower.engines.engine import JobEngine, LocalEngine
from twotower.engines.ray import RayEngine
from twotower.errors import ConfigError

ENGINES: Mapping[str, type[JobEngine]] = {engine.name: engine for engine in (LocalEngine, RayEngine)}
"""Engines by name."""


def open_engine(given: str, threads: int = 0) -> JobEngine:
    """Return the engine of a name or an address such as "ray://head:10001". `threads` 0: the threads of this machine.

    Raises ConfigError for an engine that is unknown, is not installed, or cannot use that number of threads."""
    name, has_address, _ = given.partition("://")
    found = ENGINES.get(name)
    if found is None or (has_address and not found.takes_address):
        allowed = [
            n for e in ENGINES.values() for n in (e.name, *([f"{e.name}://HOST:PORT"] if e.takes_address else []))
        ]
        raise ConfigError(f"`engine` is '{given}', allowed are {', '.join(allowed)}")
    return found(given if has_address else "", threads)
