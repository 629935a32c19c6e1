"""Engines that sort a log into buckets. One file an engine."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec

from twotower.data.prepare.engines.duckdb import DuckDb
from twotower.data.prepare.engines.engine import ROW_BYTES, Engine
from twotower.data.prepare.engines.local import Local
from twotower.engines.ray import RayEngine
from twotower.errors import ConfigError, install_command

ENGINES: Mapping[str, type[Engine]] = {engine.name: engine for engine in (Local, DuckDb)}
"""Engines by name."""


def is_ray(name: str) -> bool:
    """Return True for the name or an address of the engine of jobs that sorts buckets in other processes."""
    return name.partition("://")[0] == RayEngine.name


def choose_engine(name: str, rows: int, memory: int) -> type[Engine]:
    """Return the engine of a name; "auto" is `local` for a log of `rows` interactions that fits in `memory` bytes, else
    `duckdb`, which the processes of "ray" and of its addresses use too. Raises ConfigError for an unknown name, or if
    the log fits in no engine that is installed."""
    needed = rows * ROW_BYTES
    if name == "auto":
        name = "local" if needed <= memory else "duckdb"
        if name == "duckdb" and find_spec("duckdb") is None:
            raise ConfigError(
                f"{rows:,} interactions take about {needed / 1e6:,.0f} MB in memory, `memory` is {memory / 1e6:,.0f} "
                f"MB; raise `memory`, or let duckdb sort them on disk: {install_command('prepare')}"
            )
    name = "duckdb" if is_ray(name) else name
    if name not in ENGINES:
        raise ConfigError(f"engine '{name}': allowed are auto, {', '.join(ENGINES)}, ray, ray://HOST:PORT")
    if name == "local" and needed > memory:
        raise ConfigError(
            f"engine 'local' sorts in memory: {rows:,} interactions take about {needed / 1e6:,.0f} MB, `memory` is "
            f"{memory / 1e6:,.0f} MB; choose `engine='duckdb'`, or raise `memory`"
        )
    return ENGINES[name]
