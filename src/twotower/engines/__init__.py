"""Engines that run the shards of a job: in this process, or by Ray."""

from __future__ import annotations

from twotower.engines.engine import JobEngine, LocalEngine
from twotower.engines.ray import RayEngine
from twotower.errors import ConfigError


def open_engine(given: str, threads: int = 0) -> JobEngine:
    """Return the engine of a name or an address such as "ray://head:10001". `threads` 0: the threads of this machine.

    Raises ConfigError for an engine that is unknown, is not installed, or cannot use that number of threads."""
    if given == LocalEngine.name:
        return LocalEngine()
    name, has_address, _ = given.partition("://")
    if name != RayEngine.name:
        raise ConfigError(f"`engine` is '{given}', allowed are local, ray, ray://HOST:PORT")
    return RayEngine(given if has_address else "", threads)
