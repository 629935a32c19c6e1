"""A Ray of this machine, for the tests of a module: started once, small, and stopped at the end."""

from __future__ import annotations

import logging
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from pathlib import Path
from tempfile import gettempdir
from typing import Any

from filelock import FileLock

from twotower.engines.ray import RayEngine, _set_environment


def imported_ray() -> Any:
    """Return Ray's module, imported as the engine imports it: a Ray that begins later in this process listens on
    loopback too."""
    _set_environment("")
    return import_module("ray")


def address_of(bound: socket.socket) -> str:
    """Return the address of a socket of this machine as HOST:PORT."""
    return f"127.0.0.1:{bound.getsockname()[1]}"


@contextmanager
def running_ray(threads: int = 2) -> Iterator[RayEngine]:
    """Yield the engine with a Ray of `threads` processes, which engines that are opened within the block use too."""
    engine = RayEngine("", threads)
    with ExitStack() as stack:
        with FileLock(
            Path(gettempdir()) / "twotower-tests-ray.lock"
        ):  # those of several test processes start one after another
            stack.enter_context(engine.started())
        yield engine
    logging.getLogger("ray").setLevel(logging.NOTSET)
