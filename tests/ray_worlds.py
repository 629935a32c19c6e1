"""A Ray of this machine, for the tests of a module: started once, small, and stopped at the end."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from twotower.engines.ray import RayEngine


@contextmanager
def running_ray(threads: int = 2) -> Iterator[RayEngine]:
    """Yield the engine with a Ray of `threads` processes, which engines that are opened within the block use too."""
    engine = RayEngine("", threads)
    with engine.started():
        yield engine
    logging.getLogger("ray").setLevel(logging.NOTSET)
