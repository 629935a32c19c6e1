"""A Ray of this machine, for the tests of a module: started once, small, and stopped at the end."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from twotower.engines.ray import RayEngine, _set_environment


def imported_ray() -> Any:
    """Return Ray's module, imported as the engine imports it: a Ray that begins later in this process listens on loopback too."""
    _set_environment("")
    return import_module("ray")


@contextmanager
def running_ray(threads: int = 2) -> Iterator[RayEngine]:
    """Yield the engine with a Ray of `threads` processes, which engines that are opened within the block use too."""
    engine = RayEngine("", threads)
    with engine.started():
        yield engine
    logging.getLogger("ray").setLevel(logging.NOTSET)
